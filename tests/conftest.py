"""Settings every test shares: one thread, no network, array shapes checked at run time."""

import os

# Before torch and faiss are imported: several busy processes with several threads each crawl on two cores.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from jaxtyping import install_import_hook

# Every annotated shape and type in the package is checked on every call; must precede the first import of llmattrib.
install_import_hook("llmattrib", "beartype.beartype")

import pytest
import torch
from zygote import Zygote

torch.set_num_threads(1)


@pytest.fixture
def tokenised(monkeypatch):
    """Numbers of examples that training, or what judges by it, tokenised at a time."""
    from llmattrib import train

    sizes, encode_all = [], train.encode_all

    def counted(examples, *settings):
        sizes.append(len(examples))
        return encode_all(examples, *settings)

    monkeypatch.setattr(train, "encode_all", counted)
    return sizes


@pytest.fixture(scope="session")
def zygote():
    """What real processes are forked from; one serves all tests."""
    parent = Zygote()
    yield parent
    parent.close()
