"""OpenVINO: the model by optimum-intel, the tokenizer by openvino-tokenizers."""

import torch
from child import answer


def logits(job):
    """Return those in fp32, which has to be asked for."""
    from optimum.intel import OVModelForCausalLM

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }
    model = OVModelForCausalLM.from_pretrained(
        job["folder"], export=True, ov_config=settings, load_in_8bit=False
    )
    return model(torch.tensor(job["tokens"])).logits.tolist()


def ids(job):
    """Return those of the tokenizer as a model of OpenVINO's."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    tokenizer = openvino.compile_model(convert_tokenizer(AutoTokenizer.from_pretrained(job["folder"])), "CPU")
    return [tokenizer([text])["input_ids"][0].tolist() for text in job["texts"]]


answer(("openvino", "openvino-tokenizers", "optimum-intel", "transformers"), logits=logits, ids=ids)
