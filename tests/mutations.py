"""What accident and malice do to files. All of it is drawn from the random.Random that is passed.

A `marker` is the path of a folder that hostile code, if it ran, would make.
"""

import contextlib
import functools
import io
import pickle
import pickletools
import struct
import warnings
import zipfile
import zlib

import numpy as np
import scipy.sparse
import torch

NUMBERS = [-(2**63), -(2**31), -2, -1, 0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40,
           2**62, 2**63 - 1, 10**4000]
TEXTS = ["", " ", ".", "../../outside", "/etc/passwd", "a\nb", "\0", "x" * 5000, "\u2028\u202e",
         "state_dict", "model", "module.base_encoder.", "base_encoder.cls_token", "head.weight"]
DEEP = 20_000  # CPython itself crashes when it hashes tuples that nest some ten times deeper
MEBIBYTE = 2**20


# Any file

def in_bytes(content, rng):
    """Damage without regard to the format, more often near an end, where most formats describe."""
    near = min(len(content), 4096) + 1
    start = rng.choice([rng.randrange(len(content) + 1), rng.randrange(near),
                        len(content) - rng.randrange(near)])
    end = min(start + rng.choice([1, 2, 4, 8, rng.randrange(500)]), len(content))
    return rng.choice(BYTE_DAMAGE)(content, start, end, rng)


def _flip(content, start, end, rng):
    content = bytearray(content)
    for _ in range(rng.randrange(1, 20)):
        place = rng.choice([start, rng.randrange(len(content))]) % len(content)
        content[place] ^= 1 << rng.randrange(8)
    return bytes(content)


def _number(content, start, end, rng):
    width = rng.choice([2, 4, 8])
    return with_number(content, start - start % width, width, rng.choice(NUMBERS))


def with_number(content, place, width, number):
    number %= 2 ** (8 * width)
    return content[:place] + number.to_bytes(width, "little") + content[place + width:]


BYTE_DAMAGE = [
    _flip, _flip, _number, _number,
    lambda content, start, end, rng: content[:start],
    lambda content, start, end, rng: content[start:],
    lambda content, start, end, rng: content[:start] + content[end:],
    lambda content, start, end, rng: content[:start] + bytes(end - start) + content[end:],
    lambda content, start, end, rng: content[:start] + content[start:end] * 50 + content[end:],
    lambda content, start, end, rng: content[:end] + content[start:],
    lambda content, start, end, rng:
        content[:start] + bytes(rng.choices(range(256), k=end - start)) + content[start:],
]


# Pickles

def in_pickle(content, rng, marker):
    """Damage to one instruction: lost, repeated, another, or with a call or an odd value added."""
    found = instructions(content)
    start, end, _ = rng.choice(rng.choice([found, [each for each in found if each[2]]]))
    new = rng.choice(PICKLE_DAMAGE)(content[start:end], rng, marker)
    return content[:start] + new + content[end:]


def instructions(content):
    """Start, end and whether it has an argument, of each instruction of the pickles in a row."""
    file, found = io.BytesIO(content), []
    with contextlib.suppress(ValueError, IndexError, KeyError):  # what follows is no pickle
        while True:
            found += [(place, argument is not None) for _, argument, place
                      in pickletools.genops(file)]
    starts = [place for place, _ in found]
    return [(start, end, argument) for (start, argument), end
            in zip(found, [*starts[1:], starts[-1] + 1])]


def _call(rng, marker):
    """A call that makes the marker, in one of the ways that a pickle can make one."""
    path, command = (b"X" + struct.pack("<I", len(text)) + text.encode() for text in
                     (marker, f"__import__('os').mkdir({marker!r})"))
    return rng.choice([
        b"cos\nmkdir\n" + path + b"\x85R", b"cposix\nmkdir\n(" + path + b"tR",
        b"\x8c\x08builtins\x8c\x04eval\x93" + command + b"\x85R",
        b"(" + path + b"ios\nmkdir\n", b"c__builtin__\nexec\n" + command + b"\x85R",
    ])


def _nesting(rng):
    """A value in a list, a tuple or a dict, in another, and so on."""
    depth = rng.choice([3, 500, DEEP])
    return rng.choice([b"]" * depth + b"a" * (depth - 1), b")" + b"\x85" * depth,
                       b"(" * depth + b"l" * depth, b"}K\0" * depth + b"}" + b"s" * depth])


def _plain(rng):
    value = rng.choice([*NUMBERS, *TEXTS, None, True, -0.5, float("nan"), (), [], {}, b"bytes"])
    return pickle.dumps(value, 2)[2:-1]


OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
MUCH_ANNOUNCED = [  # texts, bytes, numbers, frames, and places in the table of known objects
    b"X\xff\xff\xff\x7f", b"T\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f",
    b"r\xff\xff\xff\x0f", b"j\xff\xff\xff\xff", b"\x8e" + b"\xff" * 7 + b"\x7f",
    b"\x96" + b"\0" * 5 + b"\1\0\0", b"\x95" + b"\0" * 5 + b"\1\0\0", b"\x8b\0\0\0\x80"]
OTHER_GLOBALS = [
    b"ctorch\nLongStorage\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nSize\n",
    b"ctorch\ndevice\n", b"ccollections\nOrderedDict\n", b"ctorch.hub\nload\n",
    b"cnumpy\nndarray\n", b"cargparse\nNamespace\n", b"c_codecs\nencode\n",
    b"cbuiltins\ngetattr\n", b"cno.such\nthing\n", b"c" + b"x" * 5000 + b"\ny\n",
    b"c\x1b[31mno\xe2\x80\xa8\nsuch\n"]
PICKLE_DAMAGE = [
    lambda old, rng, marker: _call(rng, marker),
    lambda old, rng, marker: _call(rng, marker) + b"0" + old,
    lambda old, rng, marker: _call(rng, marker) + b"0" + old,
    lambda old, rng, marker: _plain(rng),
    lambda old, rng, marker: _plain(rng),
    lambda old, rng, marker: rng.choice(MUCH_ANNOUNCED),
    lambda old, rng, marker: rng.choice(MUCH_ANNOUNCED) + old,
    lambda old, rng, marker: _nesting(rng),
    lambda old, rng, marker: _nesting(rng) + b"0" + old,
    lambda old, rng, marker: rng.choice(OTHER_GLOBALS),
    lambda old, rng, marker: rng.choice(OPCODES) + old[1:],
    lambda old, rng, marker: old * rng.choice([0, 2, 300]),
]


# Zip files, as torch.save writes them

# Signature of a header: width and offset of its sizes, places, methods and checksums.
ZIP_FIELDS = {
    b"PK\1\2": [(2, 8), (2, 10), (4, 16), (4, 20), (4, 24), (2, 28), (2, 30), (2, 32), (4, 42)],
    b"PK\3\4": [(2, 6), (2, 8), (4, 14), (4, 18), (4, 22), (2, 26), (2, 28)],
    b"PK\5\6": [(2, 8), (2, 10), (4, 12), (4, 16), (2, 20)],
}


def in_zip(content, rng, marker):
    """Damage to a member of a zip file, or to what the file says of its members."""
    kind = rng.choice(["pickle"] * 3 + ["header"] * 2 + ["bytes", "lose", "name", "pack", "bomb"])
    if kind == "header":
        return _in_zip_headers(content, rng)
    contents = members(content)
    pickled = next(i for i, (name, _) in enumerate(contents) if name.endswith("data.pkl"))
    index = pickled if kind == "pickle" else rng.randrange(len(contents))
    if kind == "bomb":
        return with_bomb(contents, index)
    name, old = contents[index]
    contents[index:index + 1] = {
        "pickle": lambda: [(name, in_pickle(old, rng, marker))],
        "bytes": lambda: [(name, in_bytes(old, rng) if old else b"x")],
        "lose": lambda: [(name, old)] * rng.choice([0, 2]),
        "name": lambda: [(name + rng.choice(TEXTS), old)],
        "pack": lambda: [(name, old)],
    }[kind]()
    packings = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    return zipped(contents, rng.choice(packings) if kind == "pack" else zipfile.ZIP_STORED)


def members(content):
    """Name and content of each member."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def zipped(contents, packing=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, content in contents:
            archive.writestr(name, content)
    return file.getvalue()


def _in_zip_headers(content, rng):
    signature = rng.choice(list(ZIP_FIELDS))
    width, offset = rng.choice(ZIP_FIELDS[signature])
    place = rng.choice(_places(content, signature)) + offset
    return with_number(content, place, width, rng.choice(NUMBERS))


def _places(content, part):
    return [place for place in range(len(content)) if content.startswith(part, place)]


def with_bomb(contents, index, size=3072 * MEBIBYTE):
    """A zip file, one member of which is so packed that it unpacks to gigabytes."""
    contents[index] = contents[index][0], zeros_deflated(size)
    content = zipped(contents)
    for signature, packing, unpacked in ((b"PK\3\4", 8, 22), (b"PK\1\2", 10, 24)):
        header = _places(content, signature)[index]
        content = with_number(content, header + packing, 2, zipfile.ZIP_DEFLATED)
        content = with_number(content, header + unpacked, 4, size)
    return content


@functools.lru_cache(maxsize=None)
def zeros_deflated(size):
    """Zeros, some mebibytes of them, packed."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(bytes(MEBIBYTE)) + packer.flush(zlib.Z_FULL_FLUSH)
    return packed * (size // MEBIBYTE) + packer.flush()


# MATLAB files

def in_mat(content, rng):
    """Damage to the headers and contents of variables, as if they had never been packed."""
    variables = list(unpacked(content[128:]))
    index = rng.randrange(len(variables))
    old = variables[index]
    variables[index] = rng.choice([
        lambda: _in_words(old, rng), lambda: _in_words(old, rng), lambda: in_bytes(old, rng),
        lambda: in_bytes(old[:64], rng) + old[64:], lambda: old * rng.choice([0, 2]),
        lambda: _nested_cells(rng.choice([2, 50, 1000])),
    ])()
    packed = [_element(15, zlib.compress(variable), align=1) for variable in variables]
    if rng.random() < 0.1:
        packed[index] = mat_bomb()
    return content[:128] + b"".join(rng.choice([packed, variables]))


def unpacked(content):
    while content:
        size = int.from_bytes(content[4:8], "little")
        yield zlib.decompress(content[8:8 + size])
        content = content[8 + size:]


def _element(kind, content, align=8):
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % align)


def _in_words(content, rng):
    """An odd number for a kind, a flag, a length or a dimension."""
    place = 4 * rng.randrange(min(len(content), 64) // 4)
    return with_number(content, place, 4, rng.choice([*range(20), *NUMBERS]))


def _head(kind, columns):
    """The `labels` up to their contents."""
    return (_element(6, bytes([kind]) + bytes(7)) + _element(5, struct.pack("<ii", 1, columns))
            + _element(1, b"labels"))


def _nested_cells(depth):
    content = b""
    for _ in range(depth):
        content = _element(14, _head(1, 1) + content)
    return content


def mat_bomb(size=224 * MEBIBYTE):
    """The `labels`, so packed that they unpack to hundreds of megabytes."""
    head = _head(9, size) + struct.pack("<II", 2, size)
    head = struct.pack("<II", 14, len(head) + size) + head
    checksum = zlib.adler32(head)
    for _ in range(size // MEBIBYTE):
        checksum = zlib.adler32(bytes(MEBIBYTE), checksum)
    stored = b"\0" + struct.pack("<HH", len(head), len(head) ^ 0xFFFF) + head
    packed = b"\x78\xda" + stored + zeros_deflated(size) + struct.pack(">I", checksum)
    return _element(15, packed, align=1)


# Lists of images

# OUTSIDE stands for the path of an image that is not in the folder of the images.
NAMES = ["../outside", "OUTSIDE", "images/../../outside", "../../../../../../../../etc/passwd",
         "/etc/passwd", "..\\outside", "..", "\0", "dog\0", "do\u0308g", "\u212f", "x" * 300,
         "x" * 2**20, "-", "%s", "~", "$HOME", "a b", "\u2028", "\x1b[31m", "\x1c", "\x85", ""]
FIELDS = ["1 1 1", "0 1 1", "38 1 1", "-1 1 1", "1.0 1 1", "1e0 1 1", "0x1 1 1", "\uff11 1 1", "",
          "1", "1 1 1 1", "nan 1 1", "9" * 5000 + " 1 1", "1 \0 1", "1\t1\t1", "1\x0b1\x0c1",
          "1 1 1 " * 10000]


def in_list(content, rng):
    """Damage to the lines of a list: names, numbers, number of lines, line ends, encoding."""
    lines = content.decode("ascii").splitlines()
    index = rng.randrange(len(lines))
    name, _, numbers = lines[index].partition(" ")
    lines[index:index + 1] = rng.choice([
        [f"{rng.choice(NAMES)} {numbers}"], [f"{rng.choice(NAMES)} {numbers}"],
        [f"{name} {rng.choice(FIELDS)}"], [lines[index]] * rng.choice([0, 2, 1000]),
        [rng.choice(["", "#" + lines[index], lines[index] + "\0"]), lines[index]],
    ])
    end = rng.choice(["\n"] * 8 + ["\r\n", "\r", "\x0b", "\u2028", "\0", " "])
    encoding = rng.choice(["utf-8"] * 9 + ["utf-16", "utf-8-sig", "utf-7"])
    return (end.join(lines) + end).encode(encoding)


# Values, before they are written

class Announced:
    """Pickles as an array of that many images, without their pixels."""

    def __init__(self, images):
        self.images = images

    def __reduce__(self):
        return np.ndarray, ((self.images, 3072), np.dtype("uint8"))


def in_value(value, rng):
    """The value with something odd in the place of one of its parts, or around it."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return rng.choice(ODD_VALUES)(value)
    value = value.copy()
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if isinstance(value, dict) and rng.random() < 0.2:
        changed = rng.choice([*TEXTS, 7, None, (1, 2), b"key"])
        value[changed] = rng.choice([value.get, value.pop])(key)
    else:
        value[key] = in_value(value[key], rng)
    return value


def _of_tensor(change):
    def changed(value):
        with contextlib.suppress(RuntimeError, AttributeError):  # of what this torch cannot do
            return change(value) if isinstance(value, torch.Tensor) and value.dim() else value
    return changed


ODD_VALUES = [
    lambda value: None, lambda value: -1.5, lambda value: "text", lambda value: b"bytes",
    lambda value: 10**30, lambda value: [], lambda value: {}, lambda value: [value],
    lambda value: (value,), lambda value: {"model": value}, lambda value: {"state_dict": value},
    lambda value: str(value)[:100], lambda value: type(value), lambda value: print,
    lambda value: torch.zeros(0), lambda value: torch.tensor(7), lambda value: torch.ones(2, 0, 3),
    lambda value: torch.tensor([float("nan"), float("inf"), -0.0]),
    lambda value: torch.zeros(1, 1, 1).expand(1, 3 * 10**6, 384),
    lambda value: torch.zeros(1, 1, 1).expand(1, 10**9, 384),
    _of_tensor(torch.Tensor.half), _of_tensor(lambda tensor: tensor.transpose(0, -1)),
    _of_tensor(lambda tensor: tensor[..., :1]), _of_tensor(lambda tensor: tensor[..., 1:]),
    _of_tensor(lambda tensor: tensor[:1].expand(tensor.shape)), _of_tensor(torch.nn.Parameter),
    _of_tensor(torch.Tensor.to_sparse), _of_tensor(lambda tensor: tensor.to(torch.complex64)),
    _of_tensor(lambda tensor: torch.empty_like(tensor, device="meta")),
    _of_tensor(lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8)),
    lambda value: np.zeros((2, 3072), np.uint8), lambda value: np.array([[1, "a"]], object),
    lambda value: np.zeros((3,), np.float32), lambda value: Announced(1),
    lambda value: np.array([(1, 2.0)], [("one", "i4"), ("two", "f8")]),
]
ODD_ARRAYS = [
    np.zeros((1, 9)), np.ones((9, 1)), np.ones((1, 0)), np.full((1, 9), 1e300), np.ones((1, 9)) / 3,
    np.full((1, 9), np.nan), np.full((1, 9), -1, np.int8), np.ones((1, 9), np.complex64), "labels",
    np.full((1, 9), 2**63, np.uint64), np.ones((1, 9), bool), np.array([[1, "a"]], object),
    {"labels": [1]}, np.array(["labels"] * 9), np.ones((1, 3, 3)), scipy.sparse.eye(9),
    np.array([(1, 2)], [("one", object), ("two", object)]), np.ones((1, 9), np.float32),
]
