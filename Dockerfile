# Built on NVIDIA's PyTorch image, whose torch, Transformer Engine and Apex are kept as they are.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE_IMAGE}

WORKDIR /workspace/megatron-periln
COPY pyproject.toml README.md LICENSE ./
COPY megatron_periln megatron_periln
COPY tools tools
COPY examples examples

# The image constrains pip to its own packages through PIP_CONSTRAINT; fail if torch changed all the same.
RUN python -c "import torch; print(torch.__version__)" > /tmp/torch-version \
    && python -m pip install --no-cache-dir --editable . \
    && python -c "import torch; print(torch.__version__)" | diff /tmp/torch-version - \
    && rm /tmp/torch-version

CMD ["python", "-m", "megatron_periln.pretrain", "--help"]
