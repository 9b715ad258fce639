import itertools
import random

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from aligngym.alignment.dpo import DPO
from aligngym.alignment.language_policy import REFERENCE_ADAPTER, LanguagePolicy
from aligngym.core import PADDING, Preferences, Trajectories

END = 0


def make(prompts, completions):
    def padded(rows):
        return torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), True, PADDING)

    actions = padded(completions)
    return Trajectories(padded(prompts), actions, actions != PADDING)


ROWS = make([[5, 6, 7], [5, 6, 7], [100]], [[9, 10, END], [11], [12, 13, 14, 15, 16]])
PAIRS = Preferences(ROWS[torch.tensor([0, 2])], ROWS[torch.tensor([1, 2])])
PAIRS.rejected.actions[1, 2:] = torch.tensor([8, PADDING, PADDING])
PAIRS.rejected.mask[1, 3:] = False


def model_log_probs(model, rows):
    """By a plain transformers or peft model, row by row."""
    result = torch.zeros(rows.mask.shape)
    with torch.no_grad():
        for row in range(len(rows)):
            prompt, completion = (x[row][x[row] != PADDING] for x in (rows.observations, rows.actions))
            logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1].float()
            result[row, : len(completion)] = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
    return result


def close(one, other):
    torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-5, atol=1e-5)


def train(policy, steps=3):
    agent = DPO(policy, PAIRS, batch_size=2, learning_rate=0.01)
    agent.learn(steps, progress=False)
    return agent


def frozen_parameters(policy):
    return {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}


class TestReference:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("packed", [True, False])
    def test_a_new_policy_is_its_reference_bit_for_bit(self, tiny_policy, packed, dtype):
        policy = tiny_policy(perturbed=False, packed=packed, dtype=dtype)
        assert policy.packed == packed
        assert torch.equal(policy(ROWS).log_probs, policy.reference_log_probs(ROWS))

    def test_it_is_the_model_below_the_adapter_whatever_happens_to_that(self, tiny_policy, model_folder):
        policy = tiny_policy()
        base = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
        expected = model_log_probs(base, ROWS)
        before = policy.reference_log_probs(ROWS)
        close(before, expected)
        assert (policy(ROWS).log_probs - before).abs().max() > 0.5
        frozen = frozen_parameters(policy)
        train(policy)
        assert torch.equal(policy.reference_log_probs(ROWS), before)
        assert all(torch.equal(p, frozen[name]) for name, p in policy.named_parameters() if name in frozen)

    def test_asking_for_it_leaves_the_policy_as_it_was(self, tiny_policy):
        policy = tiny_policy(lora={"lora_dropout": 0.5})
        for training in (True, False):
            policy.train(training)
            before = [(name, p.requires_grad) for name, p in policy.named_parameters()]
            assert torch.equal(policy.reference_log_probs(ROWS), policy.reference_log_probs(ROWS))
            assert [(name, p.requires_grad) for name, p in policy.named_parameters()] == before
            assert all(module.training == training for module in policy.modules())
        assert policy(ROWS).log_probs.requires_grad

    def test_of_a_trained_adapter_it_is_a_frozen_copy(self, tiny_policy, model_folder, tmp_path):
        trained = tiny_policy()
        trained.save(tmp_path)
        expected = trained(ROWS).log_probs
        policy = LanguagePolicy.from_pretrained(model_folder("llama"), adapter=tmp_path, dtype="float32")
        assert torch.equal(policy(ROWS).log_probs, policy.reference_log_probs(ROWS))
        close(policy.reference_log_probs(ROWS), expected)
        # One of the two adapters is trained, and the other stays.
        trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
        assert trainable == {name for name, _ in policy.named_parameters() if ".default." in name}
        assert any(f".{REFERENCE_ADAPTER}." in name for name, _ in policy.named_parameters())
        frozen, before = frozen_parameters(policy), policy(ROWS).log_probs
        train(policy)
        assert all(torch.equal(p, frozen[name]) for name, p in policy.named_parameters() if name in frozen)
        assert {name for name, p in policy.named_parameters() if p.requires_grad} == trainable
        close(policy.reference_log_probs(ROWS), expected)
        assert (policy(ROWS).log_probs - before).abs().max() > 0.01


@pytest.mark.parametrize("continued", [False, True])
def test_a_saved_adapter_loads_with_plain_peft(tiny_policy, model_folder, tmp_path, continued):
    policy = tiny_policy()
    if continued:
        policy.save(tmp_path / "first")
        policy = LanguagePolicy.from_pretrained(model_folder("llama"), adapter=tmp_path / "first", dtype="float32")
    train(policy)
    policy.save(tmp_path / "saved")
    base = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    close(model_log_probs(PeftModel.from_pretrained(base, tmp_path / "saved"), ROWS), policy(ROWS).log_probs)
    loaded = LanguagePolicy.from_pretrained(model_folder("llama"), adapter=tmp_path / "saved", dtype="float32")
    assert torch.equal(loaded(ROWS).log_probs, policy(ROWS).log_probs)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("Aa")["input_ids"] == policy.tokenizer("Aa")["input_ids"]
    assert not (tmp_path / "saved" / REFERENCE_ADAPTER).exists()


def test_bfloat16_weights_carry_a_float32_adapter(tiny_policy):
    exact, policy = tiny_policy(), tiny_policy(dtype="bfloat16")
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}
    said = policy(ROWS).log_probs
    assert said.dtype == torch.float32
    torch.testing.assert_close(said, exact(ROWS).log_probs, rtol=0.05, atol=0.1)
    said.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)


def test_bad_arguments_are_refused(model_folder, tmp_path):
    folder = model_folder("llama")
    with pytest.raises(ValueError, match="not both"):
        LanguagePolicy.from_pretrained(folder, lora=object(), adapter=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        LanguagePolicy.from_pretrained(folder, adapter=tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        LanguagePolicy.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="cannot load the model"):
        LanguagePolicy.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'int8'"):
        LanguagePolicy.from_pretrained(folder, dtype="int8")


PROMPTS = [torch.tensor([3, 1]), torch.tensor([2]), torch.tensor([4, 4, 1, 3, 2])]


class TestGenerate:
    def test_greedy_completions_are_transformers_own(self, tiny_policy, model_folder):
        policy = tiny_policy()
        rows = policy.generate(PROMPTS, max_new_tokens=8, greedy=True)
        reference = policy.generate(PROMPTS, max_new_tokens=8, greedy=True, reference=True)
        base = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
        assert not torch.equal(rows.actions, reference.actions)
        for written, model in ((rows, policy.model), (reference, base)):
            for row, prompt in enumerate(PROMPTS):
                expected = model.generate(prompt[None], max_new_tokens=8, do_sample=False)[0, len(prompt) :]
                assert written.actions[row][written.mask[row]].tolist() == expected.tolist()
                assert written.observations[row][written.observations[row] != PADDING].tolist() == prompt.tolist()

    @pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
    def test_the_company_of_longer_prompts_does_not_matter(self, tiny_policy, architecture):
        policy = tiny_policy(architecture)
        together = policy.generate(PROMPTS, max_new_tokens=6, greedy=True)
        for row, prompt in enumerate(PROMPTS):
            alone = policy.generate([prompt], max_new_tokens=6, greedy=True)
            assert together.actions[row][together.mask[row]].tolist() == alone.actions[alone.mask].tolist()

    @pytest.mark.parametrize("ends", [END, [END, 3]])
    def test_ends_are_marked(self, tiny_policy, ends):
        policy = tiny_policy(vocab_size=5)
        policy.model.generation_config.eos_token_id = ends
        ends = {ends} if isinstance(ends, int) else set(ends)
        rows = policy.generate([PROMPTS[0]] * 200, max_new_tokens=5)
        lengths = rows.lengths.tolist()
        assert {1, 5} <= set(lengths)
        for row, length in enumerate(lengths):
            tokens = rows.actions[row].tolist()
            assert rows.mask[row].tolist() == [t < length for t in range(5)]
            assert tokens[length:] == [PADDING] * (5 - length)
            assert not ends & set(tokens[: length - 1])
            ended = tokens[length - 1] in ends
            assert ended or length == 5
            assert rows.terminated[row].tolist() == [ended and t == length - 1 for t in range(5)]
            assert rows.truncated[row].tolist() == [not ended and t == length - 1 for t in range(5)]

    @pytest.mark.parametrize(
        "habits",
        [
            {},
            {"temperature": 0.2, "top_k": 2, "top_p": 0.5, "do_sample": True},
            {"repetition_penalty": 2.0},
            {"min_p": 0.5},
            {"no_repeat_ngram_size": 1},
            {"suppress_tokens": [2]},
            {"max_length": 3},
        ],
    )
    def test_completions_have_the_probabilities_that_the_policy_says(self, tiny_policy, habits):
        """All 3-token completions of a vocabulary of 4, at temperature 1, whatever the model's own settings.

        A χ² test; with a fixed seed it passes or fails for good, and a right policy fails one in 10⁴.
        """
        policy = tiny_policy(vocab_size=4)
        policy.model.get_base_model().generation_config.update(**habits)
        policy.model.generation_config.update(**habits)
        rest = itertools.product(range(1, 4), range(1, 4), range(4))
        texts = [[0], *([a, 0] for a in range(1, 4)), *(list(text) for text in rest)]
        every = make([[2, 1, 3]] * len(texts), texts)
        probabilities = policy(every).log_probs.double().sum(1).exp().detach()
        assert probabilities.sum() == pytest.approx(1.0, abs=1e-5)
        count = 20_000
        rows = policy.generate([torch.tensor([2, 1, 3])] * count, max_new_tokens=3, seed=4)
        found = {tuple(text): 0 for text in texts}
        for actions in rows.actions.tolist():
            found[tuple(token for token in actions if token != PADDING)] += 1
        expected = count * probabilities / probabilities.sum()
        common = expected > 5
        observed = torch.tensor(list(found.values()), dtype=torch.float64)
        observed, expected = (torch.cat([x[common], x[~common].sum()[None] + 1e-9]) for x in (observed, expected))
        assert stats.chisquare(observed, expected).pvalue > 1e-4
        # The settings belong to the model's owner and are as they were.
        kept = policy.model.generation_config.to_dict()
        assert all(kept[name] == value for name, value in habits.items())

    def test_tokens_of_a_larger_vocabulary_have_them_too(self, tiny_policy):
        """Far more tokens than the 50 most probable ones, which transformers samples from by default."""
        policy = tiny_policy()
        every = make([[5, 6]] * 257, [[token] for token in range(257)])
        expected = 20_000 * policy(every).log_probs[:, 0].double().softmax(0).detach()
        rows = policy.generate([torch.tensor([5, 6])] * 20_000, max_new_tokens=1)
        observed = torch.bincount(rows.actions[:, 0], minlength=257).double()
        assert (expected > 5).sum() > 150
        observed, expected = (torch.cat([x[expected > 5], x[expected <= 5].sum()[None]]) for x in (observed, expected))
        assert stats.chisquare(observed, expected).pvalue > 1e-4

    def test_greedy_is_the_most_probable_token_in_spite_of_penalties(self, tiny_policy):
        policy = tiny_policy()
        plain = policy.generate(PROMPTS, max_new_tokens=8, greedy=True)
        for config in (policy.model.generation_config, policy.model.get_base_model().generation_config):
            config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=2)
        assert torch.equal(policy.generate(PROMPTS, max_new_tokens=8, greedy=True).actions, plain.actions)

    def test_a_seed_repeats_its_samples(self, tiny_policy):
        policy = tiny_policy()
        one, again, other = (policy.generate(PROMPTS * 5, max_new_tokens=4, seed=seed).actions for seed in (1, 1, 2))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        assert not torch.equal(one[:3], one[3:6])

    def test_acting_tells_the_probabilities(self, tiny_policy):
        policy = tiny_policy(vocab_size=5)
        written, log_probs = policy.act(PROMPTS, generator=torch.Generator().manual_seed(0))
        rows = make([prompt.tolist() for prompt in PROMPTS], [text.tolist() for text in written])
        close(log_probs[rows.mask], model_log_probs(policy.model, rows)[rows.mask])

    def test_dropout_is_off_while_generating_and_back_afterwards(self, tiny_policy):
        policy = tiny_policy(lora={"lora_dropout": 0.9})
        expected = policy.eval().generate(PROMPTS, max_new_tokens=5, greedy=True).actions
        assert torch.equal(policy.train().generate(PROMPTS, max_new_tokens=5, greedy=True).actions, expected)
        assert all(module.training for module in policy.modules())

    def test_a_model_without_an_end_token_writes_to_the_limit(self, tiny_policy):
        policy = tiny_policy()
        policy.model.generation_config = policy.model.get_base_model().generation_config = GenerationConfig()
        policy.tokenizer = type("Endless", (), {"eos_token_id": None})()
        rows = policy.generate(PROMPTS, max_new_tokens=4)
        assert rows.mask.all()
        assert rows.truncated.tolist() == [[False, False, False, True]] * 3


def test_global_generators_are_left_alone(tiny_policy, model_folder):
    def states():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002

    before = states()
    policy = LanguagePolicy.from_pretrained(model_folder("llama"), dtype="float32")
    assert states() == before
    policy.generate(PROMPTS, max_new_tokens=3)
    policy.act(PROMPTS, generator=torch.Generator())
    assert states() == before
    train(tiny_policy(lora={"lora_dropout": 0.5}))
    assert states() == before


def test_the_seed_of_a_new_adapter_repeats_it(model_folder):
    def adapter(seed):
        policy = LanguagePolicy.from_pretrained(model_folder("llama"), dtype="float32", seed=seed)
        return torch.cat([p.flatten() for p in policy.trainable_state().values()])

    assert torch.equal(adapter(1), adapter(1))
    assert not torch.equal(adapter(1), adapter(2))
