"""Inference and training with the surviving kernels only: what masks cut on paper, cut in seconds.

fast = engine.compile(model, torch.zeros(1, 3, 32, 32))
scores = fast(images)
trained = engine.sparse(model, masks, torch.zeros(1, 3, 32, 32))
loss = cross_entropy(trained(images), labels)
"""

from explib.engine.compiling import Compiled, compile
from explib.engine.native import NoCompiler
from explib.engine.saving import load, save, save_onnx
from explib.engine.training import sparse

__all__ = ["Compiled", "NoCompiler", "compile", "load", "save", "save_onnx", "sparse"]
