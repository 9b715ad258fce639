import copy

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from aligngym.agents import GRPO, BehaviourCloning, EpisodeSampler, evaluate_episodes
from aligngym.alignment.text_actor import TextActor
from aligngym.alignment.text_environment import TextEnvironmentSampler
from aligngym.alignment.text_turns import TurnFormat
from aligngym.core import PADDING, TabularPolicy
from aligngym.envs.prompt_env import PromptEnv
from aligngym.envs.text_grid_world import NumberedText, TextGridWorld, text_player

END = 0
GRID = {"words": ("u", "r", "d", "l"), "rules": "", "separator": "", "step_reward": -0.1, "boundary_reward": -0.1}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Dialogue(gymnasium.Env):
    """Any text environment: it counts aloud, pays the number of the turn, and ends after ``turns``."""

    observation_space = spaces.Text(100)
    action_space = spaces.Text(100, min_length=0)

    def __init__(self, turns=3, invalid=True):
        self.turns, self.heard, self.invalid = turns, [], invalid

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.heard = []
        self.start = int(self.np_random.integers(1000))
        return f"start {self.start}", {}

    def step(self, action):
        self.heard.append(action)
        n = len(self.heard)
        over = n == self.turns
        return f"turn {n}", float(n), over and self.start % 2 == 0, over, {"is_success": n > 2}


def grid(map="...\n..G", max_steps=6, **options):
    return TextGridWorld(map, max_steps=max_steps, **GRID | options)


@pytest.fixture(scope="module")
def policy(tiny_policy):
    return tiny_policy()


@pytest.fixture(scope="module")
def chat(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def recorded(policy, monkeypatch):
    """All calls of ``policy.generate``: contexts and rows."""
    calls, generate = [], policy.generate

    def record(contexts, **options):
        rows = generate(contexts, **options)
        calls.append(([context.tolist() for context in contexts], rows))
        return rows

    monkeypatch.setattr(policy, "generate", record)
    return calls


def tokens(row):
    return row[row != PADDING].tolist()


class TestRows:
    @pytest.mark.parametrize("template", [False, True])
    def test_what_the_model_wrote_is_kept_token_by_token(self, policy, tokenizer, chat, recorded, template):
        # A random model writes bytes that are no text: what is decoded and tokenised again is something else.
        sampler = TextEnvironmentSampler(
            Dialogue(4), chat if template else tokenizer, episodes=6, group_size=2, max_new_tokens=5
        )
        rows = sampler.sample(policy, seed=0)
        assert len(recorded) == 4
        for row in range(6):
            whole, own = tokens(rows.observations[row]) + tokens(rows.actions[row]), []
            for contexts, said in recorded:
                answer = tokens(said.actions[row])
                assert whole[: len(contexts[row]) + len(answer)] == contexts[row] + answer
                own += answer
            assert whole == contexts[row] + answer
            assert rows.actions[row][rows.mask[row]].tolist() == own
        assert tokenizer(tokenizer.decode(own))["input_ids"] != own

    @pytest.mark.parametrize("max_new_tokens", [2, 3, 8])
    @pytest.mark.parametrize("system", [None, "Be brief."])
    def test_with_a_template_a_row_is_the_rendered_conversation(self, policy, chat, system, max_new_tokens):
        # Whether the model ends its answer or is cut off, the template's tokens follow it once.
        sampler = TextEnvironmentSampler(
            Dialogue(3), chat, episodes=2, max_new_tokens=max_new_tokens, system_prompt=system
        )
        rows = sampler.demonstrations(policy, lambda text: "ok", seed=1)
        for row, env in enumerate(sampler.copies):
            users = [f"start {env.start}", "turn 1", "turn 2"]
            messages = [{"role": "system", "content": system}] if system else []
            for text in users:
                messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]
            rendered = chat(chat.apply_chat_template(messages, tokenize=False))["input_ids"]
            whole = tokens(rows.observations[row]) + tokens(rows.actions[row])
            assert whole == rendered[: len(whole)]
            left = chat.decode(rendered[len(whole) :])
            assert left == ("\n" if max_new_tokens > 2 else "<|end|>\n")
            assert env.heard == ["ok"] * 3
            own = chat.decode(rows.actions[row][rows.mask[row]])
            assert own == ("ok<|end|>" if max_new_tokens > 2 else "ok") * 3

    def test_without_a_template_it_is_lines(self, policy, tokenizer):
        sampler = TextEnvironmentSampler(Dialogue(2), tokenizer, episodes=1, max_new_tokens=3, system_prompt="Hi.")
        rows = sampler.demonstrations(policy, lambda text: {"t": "yes", "s": "no"}[text[0]], seed=1)
        start = sampler.copies[0].start
        assert tokenizer.decode(tokens(rows.observations[0])) == f"Hi.\nstart {start}\n"
        assert tokenizer.decode(tokens(rows.actions[0])) == "no<|end|>\nturn 1\nyes"
        assert rows.log_probs is None

    def test_rewards_and_ends_stand_at_the_models_last_tokens(self, policy, tokenizer, recorded):
        sampler = TextEnvironmentSampler(Dialogue(3), tokenizer, episodes=4, max_new_tokens=3)
        rows = sampler.sample(policy, seed=0)
        for row, env in enumerate(sampler.copies):
            expected = torch.zeros(rows.mask.shape[1])
            for turn, (contexts, said) in enumerate(recorded, start=1):
                column = len(contexts[row]) + len(tokens(said.actions[row])) - 1 - len(tokens(rows.observations[row]))
                assert rows.mask[row, column]
                expected[column] = turn
            assert rows.rewards[row].equal(expected)
            last = torch.arange(rows.mask.shape[1]) == column
            ends = env.start % 2 == 0
            assert rows.terminated[row].equal(last & ends)
            assert rows.truncated[row].equal(last & (not ends))
        assert rows.returns.tolist() == [6.0] * 4
        assert not rows.log_probs[~rows.mask].any()
        assert {env.start % 2 for env in sampler.copies} == {0, 1}

    @pytest.mark.parametrize("packed", [True, False])
    @pytest.mark.parametrize("template", [False, True])
    def test_log_probs_are_those_that_training_computes(self, tiny_policy, tokenizer, chat, packed, template):
        policy = tiny_policy(packed=packed)
        sampler = TextEnvironmentSampler(
            Dialogue(4), chat if template else tokenizer, episodes=8, group_size=4, max_new_tokens=4
        )
        rows = sampler.sample(policy, seed=2)
        computed = policy(rows).log_probs
        torch.testing.assert_close(rows.log_probs, computed.detach(), rtol=1e-5, atol=1e-5)
        assert float(rows.log_probs[rows.mask].mean()) < -0.5

    def test_tokens_of_others_do_not_train(self, policy, tokenizer):
        rows = TextEnvironmentSampler(Dialogue(3), tokenizer, episodes=4, group_size=4, max_new_tokens=3).sample(
            policy, seed=3
        )
        others = (rows.actions != PADDING) & ~rows.mask
        assert others.sum() >= 4 * 2 * len("\nturn 1\n")
        parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        weights = torch.randn(rows.mask.shape, generator=torch.Generator().manual_seed(0))

        def gradient(batch, weights):
            return torch.cat(
                [g.flatten() for g in torch.autograd.grad((policy(batch).log_probs * weights).sum(), parameters)]
            )

        before = gradient(rows, weights)
        # Whatever stands there, it has no part in the loss.
        torch.testing.assert_close(gradient(rows, weights.where(~others, 1e6)), before, rtol=1e-5, atol=1e-6)
        # And where it has a true mask, the log-probabilities of the model's own tokens stay the same.
        everything = copy.copy(rows)
        everything.mask = rows.mask | others
        torch.testing.assert_close(
            policy(everything).log_probs.where(rows.mask, 0.0), policy(rows).log_probs, rtol=1e-5, atol=1e-6
        )
        assert (policy(everything).log_probs[others] < 0).all()

    def test_an_agent_steps_along_the_gradient_of_the_models_own_tokens(self, policy, tokenizer):
        class Lengths(Dialogue):
            def step(self, action):
                text, _, *rest = super().step(action)
                return text, float(len(action)), *rest

        sampler = TextEnvironmentSampler(Lengths(), tokenizer, episodes=8, group_size=4, max_new_tokens=3)
        agent = GRPO(policy, sampler, normalise="trajectories", scale=False, micro_batch_size=3)
        batch = agent.next_batch()
        agent.backward(agent.weighted(batch))
        parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        found = torch.cat([parameter.grad.flatten() for parameter in parameters])
        agent.optimizer.zero_grad()

        loss = 0
        for row in range(8):
            prompt, said, mask = tokens(batch.observations[row]), tokens(batch.actions[row]), batch.mask[row]
            members = batch.returns[batch.group == batch.group[row]]
            advantage = batch.returns[row] - members.mean()
            logits = policy.causal_model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
            log_probs = logits.log_softmax(-1)[torch.arange(len(said)), said]
            loss = loss - advantage * log_probs[mask[: len(said)]].sum() / 8
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        assert float(expected.norm()) > 1e-3


class TestEpisodes:
    def test_starts_are_shared_in_groups_and_with_the_sampler_of_states(self, policy, tokenizer):
        env = grid(max_steps=1)
        rows = TextEnvironmentSampler(env, tokenizer, episodes=24, group_size=4, max_new_tokens=1).sample(
            policy, seed=5
        )
        states = NumberedText(env)
        expected = EpisodeSampler(states, episodes=24, group_size=4).sample(TabularPolicy.for_env(states), seed=5)
        starts = [env.state_of(tokenizer.decode(tokens(row)).removesuffix("\n")) for row in rows.observations]
        assert starts == expected.observations[:, 0].tolist()
        assert rows.group.equal(expected.group)
        assert len(set(starts)) > 2

    def test_a_seed_repeats_a_sample(self, policy, tokenizer):
        def sample(seed):
            sampler = TextEnvironmentSampler(grid(slip=0.3), tokenizer, episodes=8, group_size=4, max_new_tokens=2)
            sampler.sample(policy, seed=99)
            return sampler.sample(policy, seed)

        first, second, other = sample(1), sample(1), sample(2)
        for name in ("observations", "actions", "rewards", "log_probs", "terminated"):
            assert getattr(first, name).equal(getattr(second, name)), name
        assert first.actions[:, 0].tolist() != other.actions[:, 0].tolist()

    def test_answers_of_several_turns_are_drawn_anew(self, tiny_policy, tokenizer):
        # With equal random numbers each turn, a model that takes no notice would always say the same.
        policy = tiny_policy()
        policy.temperature = 1e6
        rows = TextEnvironmentSampler(Dialogue(8), tokenizer, episodes=4, max_new_tokens=1).sample(policy, seed=0)
        for row in range(4):
            assert len(set(rows.actions[row][rows.mask[row]].tolist())) > 4

    def test_metrics(self, policy, tokenizer):
        env = grid()
        sampler = TextEnvironmentSampler(env, tokenizer, episodes=32, group_size=4, max_new_tokens=1)
        answers = np.random.default_rng(0).choice(["u", "r", "d", "l", "x"], 1000).tolist()
        rows = sampler.demonstrations(policy, lambda text: answers.pop(), seed=0)
        ended = rows.terminated.any(1)
        said = rows.actions[rows.mask]
        assert sampler.metrics == pytest.approx(
            {
                "return": float(rows.returns.mean()),
                "length": float(rows.lengths.float().mean()),
                "tokens": float(rows.lengths.float().mean()),
                "truncated": 1 - float(ended.float().mean()),
                "invalid": float((said == tokenizer("x")["input_ids"][0]).float().mean()),
                "success": float(ended.float().mean()),
            }
        )
        assert 0.05 < sampler.metrics["success"] < 0.95

        sampler = TextEnvironmentSampler(Dialogue(3), tokenizer, episodes=4, max_new_tokens=3)
        rows = sampler.demonstrations(policy, lambda text: "ab", seed=0)
        assert sampler.metrics.items() >= {"return": 6, "length": 3, "tokens": 9, "success": 1}.items()
        assert "invalid" not in sampler.metrics

    def test_episodes_are_cut_after_max_turns(self, policy, tokenizer):
        sampler = TextEnvironmentSampler(Dialogue(5), tokenizer, episodes=2, max_turns=2, max_new_tokens=1)
        rows = sampler.sample(policy, seed=0)
        assert rows.lengths.tolist() == [2, 2]
        assert not rows.terminated.any()
        assert rows.truncated.sum(1).tolist() == [1, 1]
        assert sampler.metrics["truncated"] == 1

    @pytest.mark.parametrize("max_length", [30, 31, 40, None])
    def test_an_episode_without_room_is_cut_loudly(self, policy, tokenizer, max_length):
        env = Dialogue(100)
        sampler = TextEnvironmentSampler(env, tokenizer, episodes=2, max_new_tokens=2, max_length=max_length)
        with pytest.warns(UserWarning, match="100% of the episodes were truncated"):
            rows = sampler.demonstrations(policy, lambda text: "ab", seed=0)
        limit = max_length or 256
        for row in range(2):
            length = len(tokens(rows.observations[row])) + len(tokens(rows.actions[row]))
            # One more reply and answer would not fit.
            assert length <= limit < length + len("\nturn 9\nab") + (rows.lengths[row] > 18)
            assert rows.mask[row, len(tokens(rows.actions[row])) - 1]
        assert sampler.metrics["overflow"] == 1
        assert not rows.terminated.any()

    def test_single_turns_with_a_verifier(self, policy, tokenizer):
        def length(prompts, completions, wanted):
            return [float(len(completions[0]) == wanted[0])]

        env = PromptEnv([{"prompt": "two:", "wanted": 2}, {"prompt": "three:", "wanted": 3}], length)
        sampler = TextEnvironmentSampler(env, tokenizer, episodes=16, group_size=2, max_new_tokens=4)
        rows = sampler.demonstrations(policy, lambda text: "ab", seed=0)
        prompts = [tokenizer.decode(tokens(row)) for row in rows.observations]
        assert set(prompts) == {"two:\n", "three:\n"}
        assert rows.returns.tolist() == [float(prompt == "two:\n") for prompt in prompts]
        assert rows.terminated.sum(1).tolist() == [1] * 16
        assert rows.mask.all()


class TestDoor:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"episodes": 5, "group_size": 2}, "5 episodes do not divide"),
            ({"max_turns": 0}, "max_turns is at least 1"),
            ({"max_new_tokens": 0}, "max_new_tokens is at least 1"),
            ({"max_length": 0}, "max_length is at least 1"),
        ],
    )
    def test_sizes(self, tokenizer, options, message):
        with pytest.raises(ValueError, match=message):
            TextEnvironmentSampler(Dialogue(), tokenizer, **options)

    def test_environments_without_text(self, tokenizer):
        with pytest.raises(TypeError, match=r"observation_space .* is Discrete"):
            TextEnvironmentSampler("aligngym/GridWorld-v0", tokenizer)
        env = Dialogue()
        env.action_space = spaces.Discrete(3)
        with pytest.raises(TypeError, match=r"action_space .* is Discrete"):
            TextEnvironmentSampler(env, tokenizer)
        env = Dialogue()
        env.reset = lambda **_: (3, {})
        with pytest.raises(TypeError, match="showed 3, which is no text"):
            TextEnvironmentSampler(env, tokenizer)

    def test_starts_that_the_seed_does_not_fix(self, policy, tokenizer):
        class Unseeded(Dialogue):
            count = 0

            def reset(self, **options):
                Unseeded.count += 1
                return f"start {Unseeded.count}", {}

        sampler = TextEnvironmentSampler(Unseeded, tokenizer, episodes=2, group_size=2)
        with pytest.raises(ValueError, match="began with 'start 2' and 'start 3'"):
            sampler.sample(policy, seed=0)

    def test_rewards_that_are_no_numbers(self, policy, tokenizer):
        class Broken(Dialogue):
            def step(self, action):
                return "?", float("nan"), False, False, {}

        with pytest.raises(FloatingPointError, match="turn 1: the environment paid nan"):
            TextEnvironmentSampler(Broken(), tokenizer).sample(policy, seed=0)

    def test_first_prompts_that_leave_no_room(self, policy, tokenizer):
        sampler = TextEnvironmentSampler(Dialogue(), tokenizer, max_new_tokens=250)
        with pytest.raises(ValueError, match="leaves no room for an answer of 250 tokens within 256"):
            sampler.sample(policy, seed=0)

    def test_demonstrations_that_do_not_fit(self, policy, tokenizer):
        sampler = TextEnvironmentSampler(Dialogue(), tokenizer, max_new_tokens=3)
        for answer in ("", "four"):
            with pytest.raises(ValueError, match=f"turn 1: the answer '{answer}' has {len(answer)} tokens"):
                sampler.demonstrations(policy, lambda text, answer=answer: answer, seed=0)

    def test_policies_without_words(self, tokenizer):
        with pytest.raises(TypeError, match=r"not TabularPolicy.*NumberedText"):
            TextEnvironmentSampler(Dialogue(), tokenizer).sample(TabularPolicy(2, 2), seed=0)

    @pytest.mark.parametrize(
        "template",
        [
            # Says how many messages there are, or leaves earlier answers out.
            "{{ messages | length }}" + TEMPLATE,
            "{% if messages | length > 3 %}!{% endif %}" + TEMPLATE,
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|end|>{% endif %}{% endfor %}",
            "{{ messages[-1].content }}<|end|>",
        ],
    )
    def test_templates_that_do_not_extend(self, tokenizer, template):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="does not extend a conversation"):
            TurnFormat(tokenizer)

    def test_templates_that_do_not_end_an_answer(self, policy, tokenizer):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = TEMPLATE.replace("<|end|>", "/")
        with pytest.raises(ValueError, match="end-of-turn token"):
            TurnFormat(tokenizer).closing(policy.end_tokens)


class TestActor:
    def test_it_plays_what_the_sampler_plays(self, policy, tokenizer):
        options = {"max_new_tokens": 3, "system_prompt": "Go!"}
        sampler = TextEnvironmentSampler(Dialogue(4), tokenizer, episodes=1, greedy=True, **options)
        sampler.sample(policy, seed=0)
        (env,) = sampler.copies
        actor = TextActor(policy, **options)
        seed = int(np.random.SeedSequence(0).generate_state(1)[0] >> 1)
        watched = actor.watching(Dialogue(4))
        for _ in range(2):
            text, _ = watched.reset(seed=seed)
            for _ in range(4):
                text, *_ = watched.step(actor(text))
            assert watched.unwrapped.heard == env.heard

    def test_it_is_evaluated_like_any_agent(self, policy):
        actor = TextActor(policy, max_new_tokens=2)
        result = evaluate_episodes(actor, actor.watching(Dialogue(3)), episodes=3)
        assert (result["return"], result["length"]) == (6.0, 3.0)

    def test_drawn_answers_follow_the_seed(self, policy):
        def heard(seed):
            actor, env = TextActor(policy, max_new_tokens=4, greedy=False, seed=seed), Dialogue(3)
            evaluate_episodes(actor, actor.watching(env), episodes=2)
            return env.heard

        assert heard(0) == heard(0) != heard(1)

    def test_it_must_know_where_an_episode_begins(self, policy):
        with pytest.raises(RuntimeError, match=r"actor\.watching\(env\)"):
            TextActor(policy)("start")

    def test_it_refuses_conversations_that_are_too_long(self, policy):
        actor = TextActor(policy, max_new_tokens=60)
        with pytest.raises(ValueError, match="no room for an answer"):
            evaluate_episodes(actor, actor.watching(Dialogue(100)), episodes=1)


def exact_greedy_return(policy, env):
    """The return of the most probable answers, by playing from every start: nothing is left to chance."""
    actor = TextActor(policy, max_new_tokens=1)
    watched = actor.watching(env)
    total = 0.0
    for state, probability in enumerate(env.mdp.initial):
        text, _ = watched.reset(options={"state": state})
        over = not probability
        while not over:
            text, reward, terminated, truncated, _ = watched.step(actor(text))
            total += probability * reward
            over = terminated or truncated
    return total


def test_one_class_trains_a_table_and_an_adapter_to_the_optimum(tiny_policy):
    env = grid()
    chance, optimum = env.exact_return(np.full((6, 4), 0.25)), env.optimal_return

    def share(value):
        return (value - chance) / (optimum - chance)

    states = NumberedText(env)
    table = GRPO(TabularPolicy.for_env(states), EpisodeSampler(states, episodes=64, group_size=8), learning_rate=0.3)
    table.learn(30, progress=False)
    assert share(env.exact_return(table.policy.probability_table())) > 0.9

    # A random model's logits are small: at temperature 1 it could not say one letter of 257 with certainty.
    policy = tiny_policy(perturbed=False, lora={"r": 16, "lora_alpha": 32})
    policy.temperature = 0.3
    rng = np.random.default_rng(0)
    walks = TextEnvironmentSampler(env, policy.tokenizer, episodes=128, max_new_tokens=1)
    demonstrations = walks.demonstrations(policy, lambda text: str(rng.choice(env.words)), seed=0)
    BehaviourCloning(policy, demonstrations, batch_size=32, learning_rate=1e-2).learn(60, progress=False)
    assert share(exact_greedy_return(policy, env)) < 0.5
    sampler = TextEnvironmentSampler(env, policy.tokenizer, episodes=64, group_size=8, max_new_tokens=1)
    adapter = GRPO(policy, sampler, learning_rate=5e-3, entropy_coefficient=0.02)
    adapter.learn(40, progress=False)
    assert type(adapter) is type(table)
    greedy = exact_greedy_return(policy, env)
    assert share(greedy) > 0.9
    assert greedy / optimum > 0.9
    judge = TextEnvironmentSampler(env, policy.tokenizer, episodes=256, max_new_tokens=1)
    returns = judge.sample(policy, seed=123).returns
    lower = float(returns.mean() - 3 * returns.std() / 16)
    assert share(lower) > 0.9


def test_a_saved_agent_goes_on_as_if_nothing_had_happened(tiny_policy, tmp_path):
    def agent():
        policy = tiny_policy()
        sampler = TextEnvironmentSampler(grid(), policy.tokenizer, episodes=8, group_size=4, max_new_tokens=2)
        return GRPO(policy, sampler, learning_rate=1e-2)

    whole = agent().learn(4, progress=False)
    first = agent().learn(2, progress=False)
    first.save(tmp_path / "agent.safetensors")
    second = agent().load(tmp_path / "agent.safetensors").learn(2, progress=False)
    for name, value in whole.policy.trainable_state().items():
        assert value.equal(second.policy.trainable_state()[name]), name


def test_a_player_of_states_may_demonstrate(tiny_policy):
    # The optimal player's rows are paid the exact optimum.
    env = grid("S..\n.#.\n..G", max_steps=6)
    policy = tiny_policy()
    moves = {0: 1, 1: 1, 2: 2, 4: 2, 3: 2, 5: 1, 6: 1}
    sampler = TextEnvironmentSampler(env, policy.tokenizer, episodes=2, max_new_tokens=1)
    rows = sampler.demonstrations(policy, text_player(moves.__getitem__, env), seed=0)
    assert rows.returns.tolist() == pytest.approx([env.optimal_return] * 2)
    assert env.optimal_return == pytest.approx(0.7)
    assert sampler.metrics["success"] == 1
