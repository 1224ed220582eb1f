# Training on GPUs.
#   docker build -t natten .
#   docker run --gpus all --shm-size 16g -v IMAGENET:/data:ro -v "$PWD/output:/work/output" natten \
#       bash classification/dist_train.sh configs/classification/nat_tiny.yml 8 /data
# Data loading passes images between processes in shared memory, and Docker's default of 64 MB is too little.
# The mounted output folder must be writable by user 1000.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

RUN apt-get update && apt-get install -y --no-install-recommends g++ git libgl1 libglib2.0-0 python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN id -u ubuntu > /dev/null 2>&1 || useradd --create-home --uid 1000 ubuntu
RUN mkdir /work && chown ubuntu /work
USER ubuntu
WORKDIR /work

COPY --chown=ubuntu . .
RUN bash tools/setup.sh train && mkdir -p output
ENV PATH=/work/.venv/bin:$PATH
