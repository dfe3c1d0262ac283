"""On PYTHONPATH, this lets Python read CIFAR files that generate.py made.

torchvision refuses files whose md5 is not the official one. Python imports a module of this name
at its start.
"""
import os

from torchvision.datasets import cifar

cifar.check_integrity = lambda path, md5=None: os.path.isfile(path)
