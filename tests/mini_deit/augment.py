"""DeiT's HEAD asks timm for this name on import; timm dropped it in 0.5."""
from timm.data.transforms import _pil_interp

BICUBIC = _pil_interp("bicubic")
