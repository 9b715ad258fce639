"""Process reward models: a rule learned from step labels, and numbers that depend on the text alone."""

import json
import random

import pytest
import torch
from peft import LoraConfig

from aligngym.alignment.process_reward_model import ProcessRewardModel, ProcessRewardTraining
from aligngym.alignment.reward_model import RewardModel
from aligngym.alignment.step_labels import StepBatch, is_stepwise, load_step_labels

PROMPT, STEPS = "2+2*3=", ["2*3=6", "2+6=8", "so 8"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def rows(count, seed):
    """Solutions of one to four steps, in which a step is wrong if and only if it has an exclamation mark."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        labels = [draw.random() < 0.6 for _ in range(draw.randint(1, 4))]
        steps = [draw.choice("abc") + ("" if label else "!") + draw.choice("de") for label in labels]
        made.append({"prompt": f"{seed}.{number}:", "completions": steps, "labels": labels})
    return made


@pytest.fixture(scope="module")
def model(model_folder, perturb):
    """``model(architecture)``: an adapter and a head whose weights matter."""

    def make(architecture="llama", perturbed=True, dropout=0.0, **options):
        lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)
        made = ProcessRewardModel.for_training(model_folder(architecture), lora=lora, dtype="float32", **options)
        if perturbed:
            perturb(made.classifier)
        return made

    return make


class TestProbabilities:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_are_the_heads_output_at_the_last_token_of_each_step(self, model, architecture, tokenizer):
        judge = model(architecture)
        (found,) = judge.step_probabilities([PROMPT], [STEPS])
        inner = judge.classifier.model.get_base_model()
        for number in range(len(STEPS)):
            text = PROMPT + "".join(step + "\n" for step in STEPS[: number + 1])
            hidden = inner.base_model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state
            logit = inner.score.modules_to_save["default"].weight[0] @ hidden[0, -1]
            assert found[number].item() == pytest.approx(logit.sigmoid().item(), abs=1e-6)

    def test_do_not_depend_on_the_batch_or_on_later_steps(self, model):
        judge = model(batch_size=2)
        solutions = [STEPS, ["a"], STEPS[:2], ["b", "c", "d", "e"]]
        together = judge.step_probabilities([PROMPT] * 4, solutions)
        for solution, found in zip(solutions, together, strict=True):
            (alone,) = judge.step_probabilities([PROMPT], [solution])
            torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together[2], together[0][:2], rtol=1e-5, atol=1e-6)

    def test_become_one_reward(self, model):
        (steps,) = model().step_probabilities([PROMPT], [STEPS])
        for aggregate, expected in (("min", steps.min()), ("product", steps.prod()), ("last", steps[2])):
            judge = model(aggregate=aggregate, label="steps")
            rewards = judge(prompts=[PROMPT] * 3, completions=["\n".join(STEPS), "\n".join(STEPS) + "\n\n", " "], x=1)
            assert rewards == [pytest.approx(float(expected)), pytest.approx(float(expected)), 0.0]
            assert judge.__name__ == "steps"

    def test_of_a_conversation_are_those_of_its_template(self, model, tokenizer):
        import copy

        judge = model()
        judge.tokenizer = copy.deepcopy(judge.tokenizer)
        judge.tokenizer.chat_template = TEMPLATE
        talk = judge([[{"role": "user", "content": "Hi"}]], [[{"role": "assistant", "content": "a\nb"}]])
        assert talk == judge(["user:Hi<|end|>assistant:"], ["a\nb"])

    def test_another_separator_ends_the_steps(self, model):
        judge = model(separator=";")
        tokens, ends = judge.tokens("p", ["ab", "c;"])
        assert judge.tokenizer.decode(tokens) == "pab;c;"
        assert ends.tolist() == [3, 5]


class TestTraining:
    def test_learns_which_steps_are_wrong(self, model):
        judge = model(perturbed=False)
        train, held_back = load_step_labels(rows(120, 0), judge).hold_back(40, seed=0)
        agent = ProcessRewardTraining(judge, train, batch_size=16, learning_rate=1e-2)
        before = agent.evaluate(held_back)
        agent.learn(90, progress=False)
        after = agent.evaluate(held_back)
        assert before["accuracy"] < 0.8
        assert after["accuracy"] > 0.95
        assert after["solution_accuracy_low"] > 0.75
        assert after["loss"] < 0.2
        assert judge(["9.9:"], ["ad\nbe"])[0] > 0.5 > judge(["9.9:"], ["ad\nb!e"])[0]

    def test_the_loss_is_the_cross_entropy_of_the_steps(self, model):
        judge = model()
        data = load_step_labels(made := rows(6, 1), judge)
        agent = ProcessRewardTraining(judge, data, batch_size=6)
        metrics = agent.step(agent.data[torch.arange(6)])
        judge = model()
        found = judge.step_probabilities([r["prompt"] for r in made], [r["completions"] for r in made])
        probabilities, labels = torch.cat(found), torch.tensor([y for r in made for y in r["labels"]]).float()
        expected = torch.nn.functional.binary_cross_entropy(probabilities, labels).item()
        assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(((probabilities > 0.5) == (labels > 0)).float().mean().item())

    def test_micro_batches_do_not_change_the_gradient(self, model):
        gradients = []
        for size in (None, 3, 1):
            judge = model()
            data = load_step_labels(rows(8, 2), judge)
            agent = ProcessRewardTraining(judge, data, batch_size=8, micro_batch_size=size)
            agent.backward(agent.next_batch())
            gradients.append({n: p.grad for n, p in judge.classifier.named_parameters() if p.requires_grad})
        assert any(gradient.abs().max() > 0 for gradient in gradients[0].values())
        for other in gradients[1:]:
            for name, gradient in gradients[0].items():
                torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)

    def test_resumed_training_ends_with_the_same_bits(self, model, tmp_path):
        def agent():
            judge = model(perturbed=False, dropout=0.3)
            return ProcessRewardTraining(judge, load_step_labels(rows(20, 3), judge), batch_size=8, micro_batch_size=4)

        whole = agent().learn(6, progress=False).state_dict()["policy"]
        agent().learn(2, progress=False).save(tmp_path / "state.safetensors")
        resumed = agent().load(tmp_path / "state.safetensors").learn(4, progress=False).state_dict()["policy"]
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def test_evaluation_by_hand(self, model):
        judge = model()
        agent = ProcessRewardTraining(judge, data := load_step_labels(made := rows(10, 4), judge), batch_size=4)
        result = agent.evaluate(data)
        found = judge.step_probabilities([r["prompt"] for r in made], [r["completions"] for r in made])
        truth = [torch.tensor(r["labels"]) for r in made]
        right = sum(bool((p > 0.5).all()) == bool(y.all()) for p, y in zip(found, truth, strict=True))
        flat, labels = torch.cat(found), torch.cat(truth)
        assert result["solution_accuracy"] == pytest.approx(right / 10)
        assert result["accuracy"] == pytest.approx(((flat > 0.5) == labels).float().mean().item())
        assert result["brier"] == pytest.approx(((flat - labels.float()) ** 2).mean().item(), rel=1e-5)
        assert result["right"] == pytest.approx(labels.float().mean().item())


class TestSaving:
    def test_what_was_saved_judges_the_same(self, model, tmp_path):
        judge = model(separator=";")
        judge.save(tmp_path)
        again = ProcessRewardModel.from_pretrained(tmp_path, dtype="float32", aggregate="last")
        assert again.separator == ";"
        assert torch.equal(*(m.step_probabilities([PROMPT], [STEPS])[0] for m in (judge, again)))
        assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}

    def test_continues_an_adapter(self, model, model_folder, tmp_path):
        judge = model(separator=";")
        judge.save(tmp_path)
        again = ProcessRewardModel.for_training(model_folder(), adapter=tmp_path, dtype="float32")
        assert again.separator == ";"
        assert set(again.classifier.trainable_state()) == set(judge.classifier.trainable_state())
        assert torch.equal(*(m.step_probabilities([PROMPT], [STEPS])[0] for m in (judge, again)))

    def test_is_not_taken_for_an_outcome_reward_model(self, model, model_folder, tmp_path):
        model().save(tmp_path / "process")
        with pytest.raises(ValueError, match="holds a process reward model, and an outcome reward model is needed"):
            RewardModel.from_pretrained(tmp_path / "process", dtype="float32")
        RewardModel.for_training(model_folder(), dtype="float32").save(tmp_path / "outcome")
        with pytest.raises(ValueError, match="holds an outcome reward model, and a process reward model is needed"):
            ProcessRewardModel.from_pretrained(tmp_path / "outcome", dtype="float32")


class TestData:
    def test_is_cut_into_tokens_with_a_place_for_every_step(self, model, tmp_path, tokenizer):
        judge = model()
        made = [{"prompt": "ab", "completions": ["c", "de\n"], "labels": [True, False]}]
        (tmp_path / "steps.jsonl").write_text(json.dumps(made[0]) + "\n")
        for source in (made, tmp_path / "steps.jsonl"):
            data = load_step_labels(source, judge)
            assert tokenizer.decode(data.tokens[0]) == "abc\nde\n"
            assert data.ends[0].tolist() == [3, 6]
            assert data.labels[0].tolist() == [1, 0]

    def test_held_back_rows_share_no_prompt_with_the_others(self, model):
        data = load_step_labels(rows(10, 0) * 3, model())
        train, held_back = data.hold_back(6, seed=0)
        assert not set(train.prompts) & set(held_back.prompts)
        assert (len(train), len(held_back)) == (24, 6)

    def test_steps_beyond_the_limit_are_cut_off_with_a_warning(self, model):
        made = [
            {"prompt": "ab", "completions": ["cd", "ef"], "labels": [True, False]},
            {"prompt": "ab", "completions": ["c"], "labels": [True]},
        ]
        with pytest.warns(UserWarning, match="--max-length 5 cuts off 33.3% of all steps$"):
            data = load_step_labels(made, model(), max_length=5)
        assert [labels.tolist() for labels in data.labels] == [[1], [1]]
        assert len(data.tokens[0]) == 5
        with pytest.raises(ValueError, match=r"cuts off 66.7% of all steps, and of 1 rows all .row 1."):
            load_step_labels(made, model(), max_length=4)
        with pytest.warns(UserWarning, match="leaves 1 rows out"):
            assert len(load_step_labels(made, model(), max_length=4, drop_invalid=True)) == 1

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"labels": [True]}, "2 steps and labels .True.: one label a step"),
            ({"labels": [True, "yes"]}, "the label 'yes' is neither true nor false"),
            ({"labels": [True, None]}, "the label None is neither"),
            ({"labels": [1, 2]}, "the label 2 is neither"),
            ({"completions": []}, "completions is not a list of steps"),
            ({"completions": "a"}, "completions is not a list of steps"),
            ({"completions": ["a", " "]}, "step 2 is empty"),
            ({"completions": ["a", 3]}, "step 2 is 3, not text"),
            ({"prompt": ""}, "prompt is empty"),
            ({"prompt": 3}, "prompt is int"),
        ],
    )
    def test_bad_rows_are_refused_with_their_number(self, model, row, message):
        good = {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}
        with pytest.raises(ValueError, match=f"1 of 2 rows cannot be used .row 2: {message}"):
            load_step_labels([good, good | row], model())
        with pytest.warns(UserWarning, match="left out"):
            assert len(load_step_labels([good, good | row], model(), drop_invalid=True)) == 1

    def test_missing_columns_and_no_rows(self, model):
        with pytest.raises(ValueError, match="row 1: no column 'labels'"):
            load_step_labels([{"prompt": "p", "completions": ["a"]}], model())
        with pytest.raises(ValueError, match="no rows"):
            load_step_labels([], model())

    def test_is_told_from_pairs(self):
        assert is_stepwise(["prompt", "completions", "labels"])
        assert not is_stepwise(["prompt", "chosen", "rejected"])


def test_refuses(model):
    with pytest.raises(ValueError, match="aggregate is one of min, product, last, not 'mean'"):
        model(aggregate="mean")
    with pytest.raises(ValueError, match="separator"):
        model(separator="")
    with pytest.raises(ValueError, match="2 prompts and 1 solutions"):
        model().step_probabilities(["a", "b"], [["c"]])
    with pytest.raises(ValueError, match="each of at least a step"):
        model().step_probabilities(["a"], [[]])


def test_padding_is_no_step():
    batch = StepBatch(torch.tensor([[5, 6]]), torch.tensor([[1, -1]]), torch.zeros(1, 2))
    assert batch.mask.tolist() == [[True, False]]
