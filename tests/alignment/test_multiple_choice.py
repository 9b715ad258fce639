"""Multiple choice in every order: answerers whose behaviour is known, and plain transformers' log-probabilities."""

import json
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligngym.alignment.language_policy import LanguagePolicy
from aligngym.alignment.multiple_choice import (
    LETTERS,
    Question,
    as_question,
    chance,
    evaluate_choices,
    letter_tokens,
    load_questions,
)
from aligngym.core import Evaluation, Trajectories
from aligngym.core.statistics import wilson_interval

COLOURS = ["red", "green", "blue", "grey", "pink"]
QUESTIONS = [
    Question(f"Which is {COLOURS[right]}? ({number})", tuple(COLOURS[:count]), right)
    for number, (count, right) in enumerate([(4, 0), (4, 3), (3, 1), (2, 1), (5, 4), (4, 2)])
]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


class Answerer:
    """Reads the question as text and answers by ``rule(options, text)``, as a letter."""

    device, context_length, training = torch.device("cpu"), None, False

    def __init__(self, tokenizer, rule, says="{}"):
        self.tokenizer, self.rule, self.says = tokenizer, rule, says
        self.calls = []

    def eval(self):
        return self

    def train(self, mode=True):
        return self

    def letter(self, prompt):
        text = self.tokenizer.decode(prompt[prompt >= 0])
        return self.rule(dict(re.findall(r"^([A-J])\. (.*)$", text, re.MULTILINE)), text)

    def __call__(self, trajectories):
        self.calls.append(trajectories)
        log_probs = torch.full(trajectories.actions.shape, -3.0) * trajectories.mask
        for row in range(len(trajectories)):
            written = self.tokenizer.decode(trajectories.actions[row][trajectories.mask[row]])
            if written.strip() == self.letter(trajectories.observations[row]):
                log_probs[row, -1] = -1.0
        return Evaluation(log_probs)

    def generate(self, prompts, **options):
        self.calls.append(options)
        written = [torch.tensor(self.tokenizer(self.says.format(self.letter(x)))["input_ids"]) for x in prompts]
        actions = torch.nn.utils.rnn.pad_sequence(written, batch_first=True, padding_value=-1)
        return Trajectories(actions, actions, actions >= 0)


def oracle(options, text):
    wanted = re.search(r"Which is (\w+)\?", text)[1]
    return next(letter for letter, option in options.items() if option == wanted)


def always(letter):
    return lambda options, text: letter


@pytest.mark.parametrize("by", ["log_probs", "text"])
class TestKnownAnswerers:
    def test_an_oracle_is_always_right(self, tokenizer, by):
        result = evaluate_choices(Answerer(tokenizer, oracle, "The answer is ({})."), QUESTIONS, by=by)
        assert result.right == [[True] * count for count in (4, 4, 3, 2, 5, 4)]
        assert result.circular_accuracy == (1.0, *wilson_interval(6, 6))
        assert result.accuracy == (1.0, *wilson_interval(6, 6))
        assert result.position_bias == 0
        # In a circle, the right option stands once in every place.
        assert result.chosen == result.correct | {"none": 0}
        assert result.correct == {"A": 6, "B": 6, "C": 5, "D": 4, "E": 1}

    def test_one_that_always_says_a_knows_nothing(self, tokenizer, by):
        result = evaluate_choices(Answerer(tokenizer, always("A")), QUESTIONS, by=by)
        assert result.circular_accuracy == (0.0, *wilson_interval(0, 6))
        # It is right once in every circle.
        assert result.accuracy.value == pytest.approx(sum(1 / count for count in (4, 4, 3, 2, 5, 4)) / 6)
        assert result.accuracy.value == pytest.approx(chance(QUESTIONS)[0])
        assert result.chosen["A"] == 22
        assert result.position_bias == pytest.approx(16 / 22)
        assert result.metrics["chosen/A"] == 1.0

    def test_asked_in_one_order_it_is_right_by_luck(self, tokenizer, by):
        result = evaluate_choices(Answerer(tokenizer, always("A")), QUESTIONS, by=by, circular=False)
        assert result.right == [[True], [False], [False], [False], [False], [False]]
        assert result.circular_accuracy == result.accuracy == (1 / 6, *wilson_interval(1, 6))


def test_a_letter_that_is_no_option_is_none(tokenizer):
    result = evaluate_choices(Answerer(tokenizer, always("E")), QUESTIONS, by="text")
    assert result.chosen == {"A": 0, "B": 0, "C": 0, "D": 0, "E": 5, "none": 17}
    silent = evaluate_choices(Answerer(tokenizer, always("I do not know")), QUESTIONS, by="text")
    assert silent.chosen["none"] == 22
    assert silent.position_bias == 1


def test_guessing_is_what_chance_says(tokenizer):
    generator = random.Random(0)
    guesser = Answerer(tokenizer, lambda options, _: generator.choice(list(options)))
    questions = [Question(f"Which is red? {number}", ("red", "blue"), number % 2) for number in range(500)]
    assert chance(questions) == (0.5, 0.25)
    result = evaluate_choices(guesser, questions, by="text")
    for estimate, expected in ((result.accuracy, 0.5), (result.circular_accuracy, 0.25)):
        assert abs(estimate.value - expected) < 4 * (0.25 / 500) ** 0.5
        assert estimate.low < estimate.value < estimate.high


def test_options_go_round():
    question = Question("?", ("w", "x", "y", "z"), 1)
    orders = [question.rotated(places) for places in range(4)]
    assert [order.choices for order in orders] == [tuple("wxyz"), tuple("xyzw"), tuple("yzwx"), tuple("zwxy")]
    assert [order.choices[order.answer] for order in orders] == ["x"] * 4
    assert sorted(order.answer for order in orders) == [0, 1, 2, 3]


def test_prompts_read_as_they_should(tokenizer):
    asked = Question("Which?", ("one", "two"), 0)
    assert asked.prompt(False)["prompt"] == "Which?\n\nA. one\nB. two\n\nAnswer:"
    assert asked.prompt(True, "Be brief.")["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Which?\n\nA. one\nB. two\n\nAnswer with the letter of the right option."},
    ]
    answerer = Answerer(tokenizer, always("A"))
    evaluate_choices(answerer, QUESTIONS[:1])
    assert tokenizer.decode(answerer.calls[0].actions[2]) == " C"
    assert [len(rows) for rows in answerer.calls] == [16]


class TestModels:
    @pytest.fixture(scope="class")
    def chat_folder(self, model_folder, tmp_path_factory):
        tokenizer = AutoTokenizer.from_pretrained(model_folder())
        tokenizer.chat_template = TEMPLATE
        folder = tmp_path_factory.mktemp("chat")
        tokenizer.save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(model_folder()).save_pretrained(folder)
        return folder

    @pytest.mark.parametrize("conversation", [True, False])
    @pytest.mark.parametrize("reference", [True, False])
    def test_letters_are_those_of_plain_transformers(self, chat_folder, perturb, conversation, reference):
        policy = LanguagePolicy.from_pretrained(chat_folder, dtype="float32")
        perturb(policy, scale=2.0, seed=3)
        letters = random.Random(1)
        questions = [
            Question("".join(letters.choices("abcxyz?", k=20)), ("one", "two", "three", "four")[: 2 + row % 3], row % 2)
            for row in range(12)
        ]
        result = evaluate_choices(policy, questions, conversation=conversation, reference=reference, batch_size=5)
        plain = AutoModelForCausalLM.from_pretrained(chat_folder, dtype=torch.float32)
        if not reference:
            with torch.no_grad():
                merged = policy.model.merge_and_unload()
            plain.load_state_dict(merged.state_dict())
        chosen = dict.fromkeys(result.chosen, 0)
        right = []
        for question in questions:
            right.append([])
            for places in range(len(question.choices)):
                order = question.rotated(places)
                text = f"{order.question}\n\n" + "\n".join(map("{}. {}".format, LETTERS, order.choices)) + "\n\n"
                if conversation:
                    text = f"user:{text}Answer with the letter of the right option.|assistant:"
                else:
                    text += "Answer: "
                tokens = torch.tensor(policy.tokenizer(text)["input_ids"])
                letters = torch.tensor([policy.tokenizer(x)["input_ids"][0] for x in LETTERS[: len(order.choices)]])
                letter = int(plain(tokens[None]).logits[0, -1][letters].argmax())
                chosen[LETTERS[letter]] += 1
                right[-1].append(letter == order.answer)
        assert reference or min(chosen[letter] for letter in "AB") > 2
        assert result.chosen == chosen
        assert result.right == right

    def test_batches_and_training_mode_change_nothing(self, tiny_policy):
        policy = tiny_policy().train()
        results = [evaluate_choices(policy, QUESTIONS, batch_size=size) for size in (1, 7, 64)]
        assert results[0] == results[1] == results[2]
        assert policy.training

    @pytest.mark.parametrize("options", [{}, {"reference": True}, {"greedy": False, "seed": 3}])
    def test_texts_are_the_models_own(self, tiny_policy, options, monkeypatch):
        policy = tiny_policy()
        asked = []
        generate = policy.generate

        def listening(prompts, **given):
            asked.append((prompts, given))
            return generate(prompts, **given)

        monkeypatch.setattr(policy, "generate", listening)
        result = evaluate_choices(policy, QUESTIONS[:2], by="text", max_new_tokens=3, **options)
        ((prompts, given),) = asked
        assert (
            given == {"greedy": True, "max_new_tokens": 3, "reference": False, "rows_at_once": 16, "seed": 0} | options
        )
        assert policy.tokenizer.decode(prompts[1]) == QUESTIONS[0].rotated(1).prompt(False)["prompt"]
        assert sum(result.chosen.values()) == 8


def test_letters_follow_a_space_that_belongs_to_them():
    """Tokenizers such as Llama 2's begin every text with a space, GPT-2's join a space to the letter."""

    def words(text, add_special_tokens=True):
        start = [1] if add_special_tokens else []
        return {"input_ids": start + [sum(part.encode()) for part in re.findall(r" ?[^ ]+| ", text)]}

    prompt = {"prompt": "Which? Answer:"}
    found = letter_tokens(prompt, 2, words)
    assert [tokens.tolist() for tokens in found] == [words(" A", False)["input_ids"], words(" B", False)["input_ids"]]
    found = letter_tokens({"prompt": [{"role": "user", "content": "Which?"}]}, 2, words)
    assert [tokens.tolist() for tokens in found] == [words("A", False)["input_ids"], words("B", False)["input_ids"]]
    with pytest.raises(ValueError, match="the tokenizer does not tell the letters A, B apart: take by='text'"):
        letter_tokens(prompt, 2, lambda text, **_: {"input_ids": [0] * (1 + text.count(" "))})


class TestData:
    def test_rows_are_read(self, tmp_path):
        path = tmp_path / "questions.jsonl"
        rows = [
            {"question": "2+2?", "choices": ["3", "4"], "answer": 1},
            {"question": "2+2?", "choices": [3, 4, 5], "answer": "b"},
            {"question": "2+2?", "choices": ["3", "4"], "answer": "1", "subject": "sums"},
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        questions = load_questions(path)
        assert [question.answer for question in questions] == [1, 1, 1]
        assert questions[1].choices == ("3", "4", "5")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"answer": 2}, "answer is 2, and should be an index from 0 to 1 or a letter from A to B"),
            ({"answer": -1}, "answer is -1"),
            ({"answer": "C"}, "answer is 'C'"),
            ({"answer": "?"}, r"answer is '\?'"),
            ({"answer": "two"}, "answer is 'two'"),
            ({"answer": True}, "answer is True"),
            ({"answer": None}, "answer is None"),
            ({"answer": 1.0}, "answer is 1.0"),
            ({"choices": "A B"}, "choices is 'A B', and should be a list of two to 10 options"),
            ({"choices": ["one"]}, "choices is"),
            ({"choices": list("abcdefghijk")}, "choices is"),
            ({"choices": ["one", "one"]}, r"two of the choices \['one', 'one'\] are the same"),
            ({"question": " "}, "question is ' ', and should be text"),
        ],
    )
    def test_a_bad_row_is_named(self, tmp_path, change, message):
        good = {"question": "Which?", "choices": ["one", "two"], "answer": 0}
        path = tmp_path / "questions.jsonl"
        path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
        with pytest.raises(ValueError, match=f"questions.jsonl, row 2: {message}"):
            load_questions(path)

    def test_missing_columns_and_rows(self, tmp_path):
        with pytest.raises(ValueError, match=r"here: no column 'answer' \(it has 'question', 'choices'\)"):
            as_question({"question": "?", "choices": ["a", "b"]}, "here")
        (tmp_path / "empty.jsonl").write_text("")
        with pytest.raises(ValueError, match=r"empty\.jsonl: no rows"):
            load_questions(tmp_path / "empty.jsonl")

    def test_bad_options(self, tokenizer):
        answerer = Answerer(tokenizer, oracle)
        for questions, options, message in (
            ([], {}, "there are no questions"),
            (QUESTIONS, {"by": "letter"}, "by='letter': 'log_probs' or 'text'"),
            (QUESTIONS, {"max_new_tokens": 4}, "max_new_tokens: nothing is written"),
            (QUESTIONS, {"batch_size": 0}, "batch_size is at least 1, not 0"),
            (QUESTIONS, {"system_prompt": "Hi"}, "the questions are plain text"),
            (QUESTIONS, {"conversation": True}, "no chat template"),
        ):
            with pytest.raises(ValueError, match=message):
                evaluate_choices(answerer, questions, **options)
        short = SimpleNamespace(tokenizer=tokenizer, context_length=50)
        with pytest.raises(ValueError, match="the prompt of row 1 has 59 tokens and leaves no room"):
            evaluate_choices(short, QUESTIONS)
        assert math.isclose(chance(QUESTIONS[3:4])[1], 0.25)
