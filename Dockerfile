# docker build -t bpf .
# docker run --rm --gpus all -v "$PWD/data:/data" -v "$PWD/runs:/runs" bpf tune --dataset cifar10 --algorithm drtp
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev make git \
    && rm -rf /var/lib/apt/lists/*

COPY . /opt/bpf
RUN make -C /opt/bpf install

ENV BPF_DATA_DIR=/data
VOLUME ["/data", "/runs"]
WORKDIR /
ENTRYPOINT ["/opt/bpf/.venv/bin/bpf"]
