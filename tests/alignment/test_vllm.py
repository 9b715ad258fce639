"""Rollouts through a vLLM server, held against a stand-in: plain transformers models that get the weights by name."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from aligngym.agents import GRPO
from aligngym.alignment.generation import Decoding, complete
from aligngym.alignment.prompt_sampler import PromptSampler
from aligngym.alignment.vllm import VLLMWriter
from aligngym.core import PADDING

PROMPTS = [torch.tensor(tokens) for tokens in ([5, 6, 7, 8, 9, 10], [20], [30, 31, 32])]
LORA = {"lora": {"target_modules": "all-linear"}}


class Server:
    """What trl's client does, on a plain model that knows of no adapter; keeps what was said to it in ``calls``."""

    def __init__(self, folder, tokenizer, mode="processed_logprobs"):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer, self.mode = tokenizer, mode
        self.calls, self.requests = [], []
        self.change = lambda answer: answer

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": self.mode}, "weight_transfer_config": {"backend": "nccl"}}

    def init_communicator(self, device):
        assert torch.device(device).type == "cpu"
        self.calls.append("connect")

    def update_named_params(self, metadata, named_params):
        own = dict(self.model.named_parameters())
        received = list(named_params)
        assert [(name, str(x.dtype).removeprefix("torch."), list(x.shape)) for name, x in received] == metadata
        # All of them, and no other: a server that got a part would go on with old weights in the rest.
        assert {name for name, _ in received} == own.keys()
        for name, value in received:
            own[name].data.copy_(value)
        self.calls.append("weights")

    def reset_prefix_cache(self):
        self.calls.append("reset")

    def generate(self, prompts, n, temperature, top_p, top_k, max_tokens, logprobs, generation_kwargs):
        assert logprobs == 0
        assert all(isinstance(token, int) for prompt in prompts for token in prompt)
        extra = dict(generation_kwargs)
        self.requests.append({"prompts": prompts, "n": n, "temperature": temperature, "top_p": top_p, **extra})
        assert extra.pop("include_stop_str_in_output") is True
        generator = torch.Generator().manual_seed(extra.pop("seed"))
        greedy = temperature == 0
        rows = complete(
            self.model,
            self.tokenizer,
            [torch.tensor(prompt) for prompt in prompts],
            n,
            Decoding(max_tokens, greedy, top_k, top_p, tuple(extra.pop("stop"))),
            end_tokens=extra.pop("stop_token_ids"),
            uniforms=1 - torch.rand(len(prompts) * n, max_tokens, generator=generator),
            temperature=1.0 if greedy else temperature,
        )
        assert not extra
        ids = [actions[mask].tolist() for actions, mask in zip(rows.actions, rows.mask, strict=True)]
        values = [row[mask].tolist() for row, mask in zip(rows.log_probs, rows.mask, strict=True)]
        return self.change(
            {
                "prompt_ids": prompts,
                "completion_ids": ids,
                # The sampled token is among others, as where more than its own log-probability is asked for.
                "logprobs": [[[-0.5, value] for value in row] for row in values],
                "logprob_token_ids": [[[-7, token] for token in row] for row in ids],
            }
        )


@pytest.fixture
def server(model_folder, tokenizer):
    return Server(model_folder(), tokenizer)


@pytest.fixture
def writer(server):
    return VLLMWriter(client=server)


def completion(rows, row):
    return rows.actions[row][rows.mask[row]].tolist()


class TestWeights:
    def test_the_server_gets_the_merged_ones(self, tiny_policy, server, writer, model_folder):
        policy = tiny_policy()
        plain = copy.deepcopy(server.model)
        writer(policy, PROMPTS, max_new_tokens=2)
        merged = copy.deepcopy(policy.model).merge_and_unload()
        received = dict(server.model.named_parameters())
        for name, expected in merged.named_parameters():
            torch.testing.assert_close(received[name].data, expected.data, rtol=1e-6, atol=1e-6)
        changed = [name for name, value in plain.named_parameters() if not torch.equal(value, received[name])]
        assert len(changed) == 14  # seven layers in each of two blocks

    def test_they_are_sent_when_the_policy_has_changed_and_only_then(self, tiny_policy, server, writer):
        policy = tiny_policy()
        writer(policy, PROMPTS, max_new_tokens=2)
        assert server.calls == ["connect", "weights", "reset"]
        writer(policy, PROMPTS, max_new_tokens=2)
        assert server.calls == ["connect", "weights", "reset"]
        parameter = next(iter(policy.trainable_state().values()))
        # In place, as optimisers do.
        parameter[0, 0] += 0.5
        rows = writer(policy, PROMPTS, max_new_tokens=4)
        assert server.calls == ["connect", *["weights", "reset"] * 2]
        torch.testing.assert_close(rows.log_probs, policy(rows).log_probs.detach(), rtol=1e-4, atol=1e-4)
        # Another policy whose adapter is the same.
        writer(tiny_policy(), PROMPTS, max_new_tokens=2)
        other = tiny_policy()
        other.load_trainable_state({name: value.clone() for name, value in tiny_policy().trainable_state().items()})
        writer(other, PROMPTS, max_new_tokens=2)
        assert server.calls.count("weights") == 4

    def test_an_update_that_failed_is_done_again(self, tiny_policy, server, writer):
        policy = tiny_policy()
        writer(policy, PROMPTS, max_new_tokens=2)
        parameter = next(iter(policy.trainable_state().values()))
        before = parameter.clone()
        parameter[0, 0] += 0.5
        working, server.reset_prefix_cache = server.reset_prefix_cache, lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            writer(policy, PROMPTS, max_new_tokens=2)
        server.reset_prefix_cache = working
        # Although the policy is what it was before, what the server has is not.
        parameter.copy_(before)
        writer(policy, PROMPTS, max_new_tokens=2)
        assert server.calls == ["connect", "weights", "reset", "weights", "weights", "reset"]

    def test_the_policy_is_left_as_it_was(self, tiny_policy, writer):
        policy = tiny_policy()
        before = {name: value.clone() for name, value in policy.named_parameters()}
        writer(policy, PROMPTS, max_new_tokens=2)
        assert all(torch.equal(before[name], value) for name, value in policy.named_parameters())

    def test_an_adapter_that_cannot_be_merged_is_refused(self, tiny_policy, server, writer):
        policy = tiny_policy(lora={"use_dora": True})
        with pytest.raises(ValueError, match=r"the adapter on model.layers.0.* a server would never see it"):
            writer(policy, PROMPTS, max_new_tokens=2)
        assert "weights" not in server.calls

    def test_layers_trained_as_a_whole_are_sent_as_trained(self, tiny_policy, model_folder, tokenizer):
        policy = tiny_policy("llama-untied", lora={"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
        for name, parameter in policy.named_parameters():
            if "modules_to_save" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        server = Server(model_folder("llama-untied"), tokenizer)
        rows = VLLMWriter(client=server)(policy, PROMPTS, completions=2, max_new_tokens=4)
        torch.testing.assert_close(rows.log_probs, policy(rows).log_probs.detach(), rtol=1e-4, atol=1e-4)


class TestCompletions:
    @pytest.mark.parametrize("decoding", [{}, {"greedy": True}, {"stop": ("a", "é")}])
    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_log_probs_are_the_policys(self, tiny_policy, writer, decoding, temperature):
        policy = tiny_policy()
        policy.temperature = temperature
        rows = writer(policy, PROMPTS, completions=3, max_new_tokens=12, seed=3, **decoding)
        assert rows.mask.sum() > 20
        torch.testing.assert_close(rows.log_probs, policy(rows).log_probs.detach(), rtol=1e-4, atol=1e-4)

    def test_restricted_they_are_those_of_what_was_drawn_from(self, tiny_policy, server, writer):
        policy = tiny_policy()
        rows = writer(policy, PROMPTS, completions=8, max_new_tokens=6, top_k=1)
        assert rows.log_probs.abs().max() < 1e-6
        rows = writer(policy, PROMPTS, completions=8, max_new_tokens=6, top_p=0.5)
        raw = policy(rows).log_probs.detach()
        # At most half the mass is cut off, and each token that is left is that much more probable.
        gain = (rows.log_probs - raw)[rows.mask]
        assert gain.min() > -1e-4
        assert 0.3 < gain.max() < 0.7
        assert server.requests[-1]["top_p"] == 0.5

    def test_greedily_it_writes_what_the_policy_writes(self, tiny_policy, writer):
        policy = tiny_policy()
        ours = policy.generate(PROMPTS, completions=2, max_new_tokens=20, greedy=True)
        theirs = writer(policy, PROMPTS, completions=2, max_new_tokens=20, greedy=True)
        for name in ("observations", "actions", "mask", "terminated", "truncated", "group"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-4, atol=1e-4)

    def test_ends_are_marked(self, tiny_policy, writer):
        policy = tiny_policy()
        for decoding in ({}, {"stop": ("a", "e", "é")}):
            rows = writer(policy, PROMPTS, completions=40, max_new_tokens=30, seed=1, **decoding)
            last = rows.mask.sum(dim=1) - 1
            places = torch.arange(120)
            ended = []
            for row in range(120):
                tokens = completion(rows, row)
                text = policy.tokenizer.decode(tokens)
                ended.append(tokens[-1] in policy.end_tokens or any(s in text for s in decoding.get("stop", ())))
            ended = torch.tensor(ended)
            assert 5 < ended.sum() < 115
            assert torch.equal(rows.terminated[places, last], ended)
            assert torch.equal(rows.truncated[places, last], ~ended)
            assert (rows.terminated | rows.truncated).sum() == 120
            assert torch.equal(rows.mask, rows.actions != PADDING)
            assert torch.equal(rows.group, torch.arange(3).repeat_interleave(40))

    def test_prompts_differ_in_their_seeds_and_the_same_seed_repeats(self, tiny_policy, server, writer):
        policy = tiny_policy()
        twice = [PROMPTS[0], PROMPTS[0]]
        rows = writer(policy, twice, completions=3, max_new_tokens=8, seed=4)
        assert [completion(rows, k) for k in range(3)] != [completion(rows, k) for k in range(3, 6)]
        assert [request["n"] for request in server.requests] == [3, 3]
        again = writer(policy, twice, completions=3, max_new_tokens=8, seed=4)
        assert torch.equal(rows.actions, again.actions)
        other = writer(policy, twice, completions=3, max_new_tokens=8, seed=5)
        assert not torch.equal(rows.actions[:, :1], other.actions[:, :1]) or rows.actions.shape != other.actions.shape


def test_grpo_trains_on_what_it_writes(tiny_policy, writer, server):
    """Its rollouts take the place of the policy's own; the cap makes the policy say log π_old itself."""
    policy = tiny_policy()

    def even(completion_ids, **_):
        return [float(sum(ids) % 2 == 0) for ids in completion_ids]

    rows = [{"prompt": "ab"}, {"prompt": "c"}]
    sampler = PromptSampler(rows, [even], prompts_per_sample=2, max_new_tokens=4, writer=writer)
    GRPO(policy, sampler, learning_rate=1e-2, importance_cap=2.0).learn(2, progress=False)
    assert server.calls.count("weights") == 2


class TestRefused:
    def test_raw_log_probabilities(self, model_folder, tokenizer):
        with pytest.raises(ValueError, match=r"gives raw_logprobs, not .* --logprobs-mode processed_logprobs"):
            VLLMWriter(client=Server(model_folder(), tokenizer, mode="raw_logprobs"))

    def test_prompts_that_are_none(self, tiny_policy, writer):
        with pytest.raises(ValueError, match="there is no prompt"):
            writer(tiny_policy(), [])
        with pytest.raises(ValueError, match="a prompt has no tokens"):
            writer(tiny_policy(), [torch.tensor([], dtype=torch.long)])
        with pytest.raises(ValueError, match="max_new_tokens is at least 1"):
            writer(tiny_policy(), PROMPTS, max_new_tokens=0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"prompt_ids": [[1, 20]]},
                r"completed 2 times \[\[1, 20\]\], and was asked to complete 2 times \[\[20\]\]",
            ),
            ({"completion_ids": [[3]]}, "completed 1 times"),
            ({"logprobs": None, "logprob_token_ids": None}, "no log-probability of token"),
            ({"logprobs": [[[None]]] * 2, "logprob_token_ids": [[[9]]] * 2}, "no log-probability of token"),
        ],
    )
    def test_answers_to_something_else(self, tiny_policy, server, writer, change, message):
        server.change = lambda answer: answer | change
        with pytest.raises(ValueError, match=message):
            writer(tiny_policy(), [PROMPTS[1]], completions=2, max_new_tokens=1)

    def test_without_vllm(self):
        with pytest.raises(ImportError, match="vLLM is not installed"):
            VLLMWriter()
