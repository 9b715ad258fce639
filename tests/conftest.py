"""What every test runs under (no network, one thread), and tiny language models made in code."""

import os

# Before the libraries that read them are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Programs that tests start have several threads, which must not burn the time of other tests while they wait.
os.environ["OMP_WAIT_POLICY"] = "passive"

import pytest
import torch

# Tensors here are tiny, and where other programs want the cores as well, waiting for a second thread takes far longer.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Begin with what takes longest, so that no process is left alone with it at the end."""
    items.sort(key=lambda item: "test_readme" not in item.nodeid)


@pytest.fixture(autouse=True)
def global_seed():
    """Tests draw from explicit generators; what libraries draw globally is at least the same in every order."""
    torch.manual_seed(0)


#: Models of a few thousand weights, whose libraries are imported only for tests that use them.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    # The usual 0.02 would make every token as probable as any other, and every mistake invisible.
    "initializer_range": 0.2,
}
ARCHITECTURES = {
    "llama": ("Llama", {**SIZES, "tie_word_embeddings": True}),
    "llama-untied": ("Llama", {**SIZES, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**SIZES, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {**SIZES, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0, "sliding_window": 8}),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 16}),
    # Its positions are learned and absolute; all others see distances only.
    "gpt2": (
        "GPT2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
        | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.2}),
}
END = 0


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, after the end-of-sequence token, which is the padding token too."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": END, **{byte: number for number, byte in enumerate(alphabet, start=1)}}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|end|>", special=True)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """``model_folder(architecture, **changes)``: a folder with a tiny random model and the tokenizer."""
    import transformers

    made = {}

    def make(architecture="llama", **changes):
        key = (architecture, *sorted(changes.items()))
        if key not in made:
            family, sizes = ARCHITECTURES[architecture]
            options = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": END, "pad_token_id": END}
            config = getattr(transformers, f"{family}Config")(**options | sizes | changes)
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            folder = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_policy(model_folder, perturb):
    """``tiny_policy(architecture, perturbed=True, …)``: a LoRA policy whose adapter changes what the model says."""

    from peft import LoraConfig

    from aligngym.alignment.language_policy import LanguagePolicy

    def make(architecture="llama", *, perturbed=True, dtype="float32", packed=True, lora=None, **changes):
        config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": "all-linear", **(lora or {})})
        folder = model_folder(architecture, **changes)
        policy = LanguagePolicy.from_pretrained(folder, lora=config, dtype=dtype, packed=packed)
        if perturbed:
            perturb(policy)
        return policy

    return make


@pytest.fixture(scope="session")
def perturb():
    """``perturb(policy)`` gives lora_B, which starts at 0, random values, so that A and B both have gradients."""

    def change(policy, scale=0.3, seed=1):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.data = scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

    return change
