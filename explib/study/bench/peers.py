"""What a user would run a network with instead: OpenVINO and ONNX Runtime, from one ONNX file.

The extra `peers` installs them. Each way is a function of float32 images (N, C, H, W) that returns
the network's output.
"""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from explib import engine
from explib.errors import extra

PACKAGES = ("openvino", "onnx", "onnxruntime")
PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""In what OpenVINO computes whatever no quantization fixes, by the precision asked for."""


def lacking() -> list[str]:
    """The packages of the extra that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


def exported(model: nn.Module, images: torch.Tensor, path: str | Path) -> Path:
    """Write a network as ONNX for any number of `images`, with `scores`; returns the path."""
    return engine.save_onnx(path, model, images, inputs=["images"], outputs=["scores"])


def quantized(path: Path, batches: Iterable[torch.Tensor]) -> Path:
    """Quantize an ONNX file to int8 by onnxruntime's static quantization; returns the new file.

    Weights signed, per channel; activations unsigned, from the least to the greatest value that
    they take over `batches` of normalized training images.
    """
    with extra("peers"):
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(quantization.CalibrationDataReader):
        """The interface that onnxruntime asks for."""

        def __init__(self):
            self.left = iter(batches)

        def get_next(self):
            images = next(self.left, None)
            return None if images is None else {"images": _array(images)}

    folded, target = path.with_suffix(".folded.onnx"), path.with_suffix(".int8.onnx")
    quant_pre_process(str(path), str(folded))
    quantization.quantize_static(
        str(folded),
        str(target),
        Batches(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        activation_type=quantization.QuantType.QUInt8,
        calibrate_method=quantization.CalibrationMethod.MinMax,
    )
    return target


def openvino_computes(precision: str) -> bool:
    """Whether OpenVINO says that this processor computes in a precision of PRECISIONS."""
    with extra("peers"):
        import openvino
    known = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return precision.upper() in known or precision == "fp32"


def in_openvino(path: Path, shape: tuple[int, ...], precision: str, threads: int) -> Callable:
    """An ONNX file in OpenVINO, compiled for inputs of exactly this shape.

    Set for the shortest time of one call; the images are read where they lie.
    """
    with extra("peers"):
        import openvino as ov
    core = ov.Core()
    model = core.read_model(str(path))
    model.reshape(list(shape))
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def forward(images: torch.Tensor) -> torch.Tensor:
        request.infer({0: _array(images)}, share_inputs=True)
        return torch.from_numpy(request.get_output_tensor().data)  # the next call overwrites it

    return forward


def in_onnxruntime(path: Path, threads: int) -> Callable:
    """An ONNX file in ONNX Runtime, on its CPU provider with every optimization."""
    with extra("peers"):
        import onnxruntime as ort
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # its threads are not to wait in a loop while it is another one's turn
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"images": _array(images)})[0])

    return forward


def _array(images: torch.Tensor) -> np.ndarray:
    return images.contiguous().numpy()
