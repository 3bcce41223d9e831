# NVIDIA's NeMo container with the few versions that this repository needs on top, and the user who builds it.
# Built and started by make-and-run-docker.sh. Holds NeMo 2.4.0, Megatron-core, TransformerEngine, Python 3.12.
FROM nvcr.io/nvidia/nemo:25.07

# The versions of requirements.lock. NeMo's Qwen2-VL importer refuses transformers above 4.51.3; Energon 5.2.0 is what
# NeMo 2.4 pins. --no-deps: the container's own torch, numpy and TransformerEngine fit each other and must stay.
# PIP_CONSTRAINT: NVIDIA's PyTorch images set it to a list that forbids other versions than theirs.
RUN PIP_CONSTRAINT="" python -m pip install --no-cache-dir --no-deps \
        av==17.1.0 \
        megatron-energon==5.2.0 \
        qwen-vl-utils==0.0.14 \
        tokenizers==0.21.4 \
        transformers==4.51.3 \
        webdataset==0.2.111

# What --no-deps left to the container must be there: better to see it now than hours into a run.
RUN python -c "import av, braceexpand, multistorageclient, numpy, PIL, scipy, tqdm, transformers, webdataset, yaml" \
    && python -c "from transformers import Qwen2VLForConditionalGeneration"

# The mounted repository may hold a .venv of the machine outside, which the scripts would take.
ENV PYTHON=python

# The user outside, so that what is written to the mounted folders is theirs. An id or a name that the base image uses
# already (Ubuntu's 1000) is taken over.
ARG UID=1000
ARG GID=1000
ARG USER_NAME=user
RUN if [ "${UID}" -ne 0 ]; then \
        if id "${UID}" > /dev/null 2>&1; then userdel "$(id --name --user "${UID}")"; fi; \
        if id "${USER_NAME}" > /dev/null 2>&1; then userdel "${USER_NAME}"; fi; \
        if ! getent group "${GID}" > /dev/null; then groupadd --gid "${GID}" "group${GID}"; fi; \
        useradd --no-log-init --create-home --uid "${UID}" --gid "${GID}" --shell /bin/bash "${USER_NAME}"; \
    fi
USER ${UID}:${GID}

WORKDIR /workspace/repository
CMD ["bash"]
