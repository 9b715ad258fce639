import collections
import copy
import itertools

import pytest
import torch
from scipy import stats

from aligngym.alignment.captured_decoding import CachedWriter
from aligngym.alignment.completions import Completions, choose
from aligngym.alignment.generation import Decoding, PlainWriter, complete
from aligngym.alignment.language_policy import LanguagePolicy
from aligngym.alignment.models import decoder_layers
from aligngym.core import PADDING, Trajectories

PROMPTS = [torch.tensor(tokens) for tokens in ([5, 6, 7, 8, 9, 10], [20], [30, 31, 32])]
ALL = ["llama", "llama-untied", "qwen2", "qwen3", "gemma2", "mistral", "gpt2", "mamba"]
# peft adapts no other layers of such models.
LORA = {"mamba": {"target_modules": ["in_proj"]}}


def alone(rows, row):
    """The completion of one row, without padding."""
    return rows.actions[row][rows.mask[row]].tolist()


@pytest.mark.filterwarnings("ignore")
class TestLogProbs:
    @pytest.mark.parametrize("architecture", ALL)
    def test_they_are_those_of_the_policy(self, tiny_policy, architecture):
        policy = tiny_policy(architecture, lora=LORA.get(architecture))
        rows = policy.generate(PROMPTS, completions=4, max_new_tokens=12, seed=3)
        assert rows.mask.sum() > 80
        torch.testing.assert_close(rows.log_probs, policy(rows).log_probs.detach(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("temperature", [0.5, 2.0])
    @pytest.mark.parametrize("packed", [True, False])
    def test_the_temperature_is_the_policys_own(self, tiny_policy, model_folder, temperature, packed):
        policy = tiny_policy(packed=packed)
        plain = policy.generate(PROMPTS, completions=2, max_new_tokens=6)
        at_one = policy(plain, entropy=True)
        policy.temperature = temperature
        rows = policy.generate(PROMPTS, completions=2, max_new_tokens=6)
        torch.testing.assert_close(rows.log_probs, policy(rows).log_probs.detach(), rtol=1e-4, atol=1e-4)
        warmer = policy(plain, entropy=True)
        assert ((warmer.entropy > at_one.entropy) == (temperature > 1))[plain.mask].all()
        # By the definition: logits divided by the temperature.
        row, prompt = plain[torch.tensor([0])], PROMPTS[0]
        written = torch.tensor(alone(plain, 0))
        logits = policy.model(torch.cat([prompt, written])[None]).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, written[:, None])[:, 0]
        torch.testing.assert_close(policy(row).log_probs[row.mask], expected, rtol=1e-4, atol=1e-5)

    def test_the_temperature_divides_the_bias_of_a_head_too(self, tiny_policy):
        policy = tiny_policy()
        head = policy.causal_model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.linspace(-2, 2, 257), requires_grad=False)
        policy.temperature = 0.5
        rows = policy.generate(PROMPTS, completions=2, max_new_tokens=6)
        for packed in (True, False):
            policy.packed = packed
            torch.testing.assert_close(rows.log_probs, policy(rows).log_probs.detach(), rtol=1e-4, atol=1e-4)

    def test_of_the_reference_they_are_the_references(self, tiny_policy):
        policy = tiny_policy()
        rows = policy.generate(PROMPTS, completions=2, max_new_tokens=6, reference=True)
        torch.testing.assert_close(rows.log_probs, policy.reference_log_probs(rows), rtol=1e-4, atol=1e-4)

    def test_of_greedy_tokens_they_are_the_policys(self, tiny_policy):
        policy = tiny_policy()
        rows = policy.generate(PROMPTS, max_new_tokens=6, greedy=True, top_k=1)
        torch.testing.assert_close(rows.log_probs, policy(rows).log_probs.detach(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("decoding", "kept"), [({"top_k": 2}, 2), ({"top_p": 0.95}, None)])
    def test_restricted_they_are_those_of_what_was_drawn_from(self, tiny_policy, decoding, kept):
        policy = tiny_policy(vocab_size=6)
        count = 4000
        rows = policy.generate([PROMPTS[0].clamp(max=5)], completions=count, max_new_tokens=1, seed=1, **decoding)
        table = (
            torch.stack(
                [
                    policy(Trajectories(rows.observations[:1], torch.tensor([[a]]), torch.ones(1, 1).bool())).log_probs
                    for a in range(6)
                ]
            )
            .detach()[:, 0, 0]
            .exp()
        )
        order = table.argsort(descending=True)
        if kept is None:
            # The smallest set of the most probable tokens that has 0.95 together.
            kept = int((table[order].cumsum(0) < 0.95).sum()) + 1
        assert 1 < kept < 6
        expected = torch.zeros(6)
        expected[order[:kept]] = table[order[:kept]] / table[order[:kept]].sum()
        torch.testing.assert_close(rows.log_probs[:, 0].exp(), expected[rows.actions[:, 0]], rtol=1e-4, atol=1e-5)
        found = torch.bincount(rows.actions[:, 0], minlength=6).double()
        chosen = expected > 0
        assert found[~chosen].sum() == 0
        shares = expected[chosen].double()
        assert stats.chisquare(found[chosen], count * shares / shares.sum()).pvalue > 1e-4


@pytest.mark.filterwarnings("ignore")
class TestPrefill:
    @pytest.mark.parametrize("architecture", ALL)
    def test_a_prompt_computed_once_is_completed_as_if_it_stood_there_often(self, tiny_policy, architecture):
        policy = tiny_policy(architecture, lora=LORA.get(architecture))
        once = policy.generate(PROMPTS, completions=3, max_new_tokens=8, seed=2)
        often = policy.generate([prompt for prompt in PROMPTS for _ in range(3)], max_new_tokens=8, seed=2)
        assert torch.equal(once.actions, often.actions)
        assert once.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert often.group.tolist() == list(range(9))
        assert len({tuple(alone(once, row)) for row in range(9)}) > 5

    def test_what_a_row_says_does_not_depend_on_those_beside_it(self, tiny_policy):
        policy = tiny_policy(vocab_size=7)
        prompts = [prompt.clamp(max=6) for prompt in PROMPTS]
        whole = policy.generate(prompts, completions=8, max_new_tokens=20, seed=5)
        # Some end early and are taken out while others go on.
        assert whole.lengths.min() < 4
        assert whole.lengths.max() > 12
        for rows_at_once in (1, 8, 16, 100):
            parts = policy.generate(prompts, completions=8, max_new_tokens=20, seed=5, rows_at_once=rows_at_once)
            assert torch.equal(parts.actions, whole.actions)
            assert torch.equal(parts.group, whole.group)
            torch.testing.assert_close(parts.log_probs, whole.log_probs, rtol=1e-4, atol=1e-4)

    def test_one_seed_repeats_and_another_does_not(self, tiny_policy):
        policy = tiny_policy()
        one, same, other = (policy.generate(PROMPTS, max_new_tokens=8, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one.actions, same.actions)
        assert not torch.equal(one.actions, other.actions)


class TestEnds:
    def test_a_stop_text_ends_a_completion_and_belongs_to_it(self, tiny_policy):
        policy = tiny_policy(vocab_size=5)
        say = policy.tokenizer.decode
        prompts = [torch.tensor([1, 2])]
        free = policy.generate(prompts, completions=60, max_new_tokens=10, seed=1)
        pairs = collections.Counter(pair for row in range(60) for pair in itertools.pairwise(alone(free, row)[1:]))
        stop = say(list(pairs.most_common(1)[0][0]))
        rows = policy.generate(prompts, completions=60, max_new_tokens=10, seed=1, stop=(stop, "never said"))
        stopped = 0
        for row in range(60):
            before, tokens = alone(free, row), alone(rows, row)
            where = say(before).find(stop)
            if where < 0:
                assert tokens == before
                assert torch.equal(rows.terminated[row].any(), free.terminated[row].any())
            else:
                stopped += 1
                assert say(tokens) == say(before)[: where + len(stop)]
                assert rows.terminated[row].nonzero().tolist() == [[len(tokens) - 1]]
                assert not rows.truncated[row].any()
        assert 5 < stopped < 55

    @pytest.mark.parametrize(
        ("decoding", "message"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens is at least 1, not 0"),
            ({"top_k": -1}, "top_k is a number of tokens"),
            ({"top_p": 0.0}, "top_p is a probability"),
            ({"stop": ("",)}, "stop is a sequence of texts"),
            ({"stop": "word"}, "stop is a sequence of texts"),
        ],
    )
    def test_bad_settings_are_refused(self, tiny_policy, decoding, message):
        with pytest.raises(ValueError, match=message):
            tiny_policy().generate(PROMPTS, **decoding)

    def test_empty_prompts_are_refused(self, tiny_policy):
        with pytest.raises(ValueError, match="there is no prompt"):
            tiny_policy().generate([])
        with pytest.raises(ValueError, match="a prompt has no tokens"):
            tiny_policy().generate([PROMPTS[0], torch.tensor([], dtype=torch.long)])
        with pytest.raises(ValueError, match="temperature is positive"):
            LanguagePolicy(tiny_policy().model, None, temperature=0.0)


class Writing:
    """A policy's model that writes by one writer or another, and which it was."""

    def __init__(self, policy, vocabulary=257):
        self.policy, self.vocabulary = policy, vocabulary
        self.cached = CachedWriter(policy.causal_model)

    def __call__(self, cached, prompts=PROMPTS, copies=2, seed=0, ends=(0,), **decoding):
        how = Decoding(**{"max_new_tokens": 10, **decoding})
        uniforms = 1 - torch.rand(
            len(prompts) * copies, how.max_new_tokens, generator=torch.Generator().manual_seed(seed)
        )
        model = self.policy.causal_model
        writer = self.cached if cached else PlainWriter(model)
        prompts = [prompt.clamp(max=self.vocabulary - 1) for prompt in prompts]
        return complete(
            model, self.policy.tokenizer, prompts, copies, how, end_tokens=ends, uniforms=uniforms, writer=writer
        )

    def agree(self, **options):
        cached, plain = self(True, **options), self(False, **options)
        assert torch.equal(cached.actions, plain.actions)
        for name in ("observations", "mask", "terminated", "truncated", "group"):
            assert torch.equal(getattr(cached, name), getattr(plain, name))
        torch.testing.assert_close(cached.log_probs, plain.log_probs, rtol=1e-4, atol=1e-4)
        return cached


PACKED = ["llama", "llama-untied", "qwen2", "qwen3", "gpt2"]
#: Prompts that begin alike, one of which another goes on with, one twice.
ALIKE = [torch.tensor(tokens) for tokens in ([5, 6, 7, 8], [5, 6, 7, 8, 9, 10, 11], [5, 6, 4], [5, 6, 4])]


@pytest.mark.filterwarnings("ignore")
class TestCachedWriter:
    @pytest.mark.parametrize("architecture", PACKED)
    def test_greedy_it_writes_what_transformers_generate_does(self, tiny_policy, architecture):
        policy = tiny_policy(architecture)
        assert policy.packed
        for prompts in (PROMPTS, ALIKE):
            rows = Writing(policy)(True, prompts, copies=2, greedy=True, ends=(), max_new_tokens=12)
            for row, prompt in enumerate(prompt for prompt in prompts for _ in range(2)):
                policy.model.generation_config.eos_token_id = None
                expected = policy.model.generate(
                    input_ids=prompt[None], do_sample=False, max_new_tokens=12, pad_token_id=0
                )
                assert alone(rows, row) == expected[0, len(prompt) :].tolist()

    @pytest.mark.parametrize("architecture", PACKED)
    @pytest.mark.parametrize("prompts", [PROMPTS, ALIKE, PROMPTS[:1]], ids=["ragged", "alike", "one"])
    def test_it_draws_what_the_plain_one_does(self, tiny_policy, architecture, prompts):
        writing = Writing(tiny_policy(architecture))
        for options in ({"copies": 1}, {"copies": 3, "top_k": 9}, {"top_p": 0.8}):
            writing.agree(prompts=prompts, **options)

    def test_rows_leave_and_others_go_on(self, tiny_policy, monkeypatch):
        writing = Writing(tiny_policy(vocab_size=7), 7)
        sizes, step = [], CachedWriter._step
        monkeypatch.setattr(CachedWriter, "_step", lambda self, slots: (sizes.append(slots), step(self, slots))[1])
        rows = writing.agree(copies=8, max_new_tokens=30)
        assert rows.lengths.min() < 4
        assert sizes == [int((rows.lengths > t).sum()) for t in range(1, len(sizes) + 1)]

    def test_a_few_sizes_as_with_graphs(self, tiny_policy, monkeypatch):
        """Every fourth token only, halves are taken out, and the batch has rows that nobody asked for."""
        monkeypatch.setattr("aligngym.alignment.generation.LOOK_EVERY", {"cpu": 4})
        monkeypatch.setattr("aligngym.alignment.captured_decoding.SMALLEST_GRAPH", 3)
        monkeypatch.setattr(CachedWriter, "_captures_here", property(lambda self: True))
        sizes = []
        step = CachedWriter._step

        def write(self, slots):
            sizes.append(slots)
            step(self, slots)

        monkeypatch.setattr(CachedWriter, "write", write)
        writing = Writing(tiny_policy(vocab_size=7), 7)
        writing.agree(copies=8, max_new_tokens=30)
        assert set(sizes) == {24, 12, 6, 3}
        assert sizes == sorted(sizes, reverse=True)
        sizes.clear()
        # Ten rows in memory made for 24 take the places of twelve.
        writing.agree(prompts=PROMPTS[:2], copies=5, seed=3, max_new_tokens=9)
        assert sizes[0] == 12

    def test_memory_is_kept_until_there_is_no_room(self, tiny_policy):
        writing = Writing(tiny_policy())
        writing.agree(copies=4)
        first = writing.cached.completions, writing.cached.cache
        writing.agree(prompts=ALIKE, copies=3, max_new_tokens=7, seed=1)
        assert (writing.cached.completions, writing.cached.cache) == first
        writing.agree(prompts=ALIKE, copies=4, max_new_tokens=7)
        second = writing.cached.completions, writing.cached.cache
        assert second[0].actions.shape == (16, 10)
        assert second[0] is not first[0]
        assert second[1] is not first[1]

    def test_other_weights_are_noticed(self, tiny_policy):
        policy = tiny_policy()
        writing = Writing(policy)
        writing(True)
        first = writing.cached.cache
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.01)
        writing.agree()
        assert writing.cached.cache is first
        for parameter in policy.parameters():
            parameter.data = parameter.data.clone()
        writing.agree()
        assert writing.cached.cache is not first

    def test_compiled_layers_write_the_same(self, tiny_policy):
        policy = tiny_policy()
        expected = policy.generate(PROMPTS, completions=2, max_new_tokens=8)
        compiled = []

        def backend(graph, inputs):
            compiled.append(graph)
            return graph.forward

        torch._dynamo.reset()
        for layer in decoder_layers(policy.causal_model):
            layer.compile(backend=backend, dynamic=True)
        for number in range(2):
            rows = policy.generate(PROMPTS, completions=2, max_new_tokens=8)
            assert torch.equal(rows.actions, expected.actions)
            if not number:
                first = len(compiled)
        # One for all layers and lengths, and perhaps one that took the first numbers for constants.
        assert 0 < len(compiled) == first <= 2

    def test_a_copy_of_the_policy_writes_for_itself(self, tiny_policy):
        policy = tiny_policy()
        expected = policy.generate(PROMPTS, max_new_tokens=6)
        other = copy.deepcopy(policy)
        for parameter in other.parameters():
            parameter.data.mul_(1.5)
        found = other.generate(PROMPTS, max_new_tokens=6)
        torch.testing.assert_close(found.log_probs, other(found).log_probs.detach(), rtol=1e-4, atol=1e-4)
        assert torch.equal(policy.generate(PROMPTS, max_new_tokens=6).actions, expected.actions)

    def test_what_it_cannot_compute_is_written_plainly(self, tiny_policy):
        policy = tiny_policy("mistral")
        assert policy.packed
        with pytest.warns(UserWarning, match="sliding window; writing with transformers' own cache"):
            policy.generate(PROMPTS, max_new_tokens=11)

    def test_it_draws_from_the_bfloat16_models_own_table(self, tiny_policy):
        policy = tiny_policy(dtype="bfloat16")
        rows = policy.generate(PROMPTS, completions=3, max_new_tokens=10)
        torch.testing.assert_close(rows.log_probs, policy(rows).log_probs.detach(), rtol=0.1, atol=0.1)


def test_slots_that_nobody_asked_for_have_ended():
    completions = Completions(5, 3, torch.device("cpu"))
    for count in (2, 4):
        completions.begin(torch.ones(count, 3), 1.0)
        assert completions.running(5).tolist() == [row < count for row in range(5)]


class TestChoose:
    @pytest.mark.parametrize("size", [5, 128, 300])
    def test_it_is_the_first_token_at_which_probabilities_come_up_to_the_number(self, size):
        generator = torch.Generator().manual_seed(size)
        scores = 3 * torch.randn(1, size, generator=generator) - 700
        scores[0, ::3] = -torch.inf
        cumulative = scores.double().softmax(1).cumsum(1)
        uniforms = torch.cat([torch.linspace(1e-7, 1, 501), torch.ones(1)])
        tokens, log_probs = choose(scores.expand(len(uniforms), -1), uniforms)
        exact = torch.searchsorted(cumulative[0] / cumulative[0, -1], uniforms.double())
        # But for numbers within rounding of a border.
        assert (tokens != exact).sum() <= 1
        assert scores[0, tokens].isfinite().all()
        torch.testing.assert_close(log_probs, scores.double().log_softmax(1)[0, tokens].float(), rtol=1e-5, atol=1e-5)
        greedy, _ = choose(scores, None)
        assert greedy == scores.argmax()


class TestCritic:
    @pytest.fixture
    def policy(self, model_folder, perturb):
        policy = LanguagePolicy.from_pretrained(model_folder("llama"), dtype="float32", critic=True)
        perturb(policy)
        torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(0))
        return policy

    def test_it_begins_at_nothing(self, model_folder):
        policy = LanguagePolicy.from_pretrained(model_folder("llama"), dtype="float32", critic=True)
        rows = policy.generate(PROMPTS, max_new_tokens=6)
        assert policy.has_critic
        assert torch.equal(policy(rows).values, torch.zeros(rows.mask.shape))
        assert not LanguagePolicy.from_pretrained(model_folder("llama"), dtype="float32").has_critic

    def test_values_are_the_heads_of_the_critics_own_adapter(self, policy):
        rows = policy.generate(PROMPTS, completions=2, max_new_tokens=6)
        values = policy(rows).values.detach()
        assert (values[~rows.mask] == 0).all()
        for row in range(len(rows)):
            prompt, written = PROMPTS[row // 2], torch.tensor(alone(rows, row))
            with torch.no_grad(), policy.using_adapter("critic"):
                hidden = policy.causal_model.model(torch.cat([prompt, written])[None]).last_hidden_state[0]
            expected = policy.value_head(hidden[len(prompt) - 1 : -1])[:, 0].detach()
            torch.testing.assert_close(values[row][rows.mask[row]], expected, rtol=1e-4, atol=1e-4)

    def test_packed_and_padded_values_and_their_gradients_are_equal(self, policy):
        rows = policy.generate(PROMPTS, completions=2, max_new_tokens=6)
        found = []
        for packed in (True, False):
            policy.packed = packed
            evaluation = policy(rows)
            (evaluation.values.square().mean() + evaluation.log_probs.mean()).backward()
            found.append([evaluation.values.detach(), *(p.grad for p in policy.parameters() if p.requires_grad)])
            policy.zero_grad()
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    def test_actor_and_critic_learn_apart(self, policy):
        rows = policy.generate(PROMPTS, max_new_tokens=6)

        def learners(loss):
            loss.backward()
            named = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
            policy.zero_grad(set_to_none=True)
            return named

        values = learners(policy(rows).values.square().sum())
        actor = learners(policy(rows).log_probs.sum())
        assert values
        assert actor
        assert not values & actor
        assert all("critic" in name or "value_head" in name for name in values)
        assert values | actor == set(policy.trainable_state())

    def test_both_are_trained_whatever_was_asked_before(self, policy):
        trained = set(policy.trainable_state())
        assert any("critic" in name for name in trained)
        rows = policy.generate(PROMPTS, max_new_tokens=6)
        for ask in (policy, policy.reference_log_probs):
            ask(rows)
            assert set(policy.trainable_state()) == trained

    def test_the_reference_and_what_is_written_are_as_without_one(self, policy, tiny_policy):
        rows = policy.generate(PROMPTS, max_new_tokens=6)
        torch.testing.assert_close(rows.log_probs, policy(rows).log_probs.detach(), rtol=1e-4, atol=1e-4)
        plain = tiny_policy(perturbed=False)
        torch.testing.assert_close(policy.reference_log_probs(rows), plain(rows).log_probs.detach())

    def test_the_saved_adapter_is_the_actors(self, policy, tmp_path):
        policy.save(tmp_path)
        rows = policy.generate(PROMPTS, max_new_tokens=6)
        again = LanguagePolicy.from_pretrained(
            policy.model.peft_config["default"].base_model_name_or_path, adapter=tmp_path
        )
        torch.testing.assert_close(again(rows).log_probs, policy(rows).log_probs)
        assert not (tmp_path / "critic").exists()


def test_padding_is_no_token(tiny_policy):
    rows = tiny_policy().generate(PROMPTS, max_new_tokens=4)
    assert (rows.actions[~rows.mask] == PADDING).all()
    assert (rows.observations[1] == PADDING).sum() == 5
