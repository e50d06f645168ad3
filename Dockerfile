# Built on NVIDIA's PyTorch image, whose torch, Transformer Engine and Apex are kept as they are.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE_IMAGE}

WORKDIR /workspace/megatron-periln

# What is installed changes less often than our sources, which stand in layers of their own.
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY megatron_periln/__init__.py megatron_periln/version.py megatron_periln/
COPY tools/image_packages.py tools/
RUN python tools/image_packages.py record constraints.txt /tmp/image \
    && python -m pip install --no-cache-dir --constraint /tmp/image/constraints.txt --editable . \
    && python tools/image_packages.py verify /tmp/image \
    && rm -r /tmp/image

COPY megatron_periln megatron_periln
COPY tools tools
COPY examples examples
RUN python -m compileall -q megatron_periln \
    && chmod -R a+rX . \
    && mkdir -p /home/trainer \
    && chmod 1777 /home/trainer

# Any user may run it: caches go to a home that everyone can write, under a name that needs no account.
ENV HOME=/home/trainer USER=trainer

CMD ["python", "-m", "megatron_periln.doctor"]
