"""RLHF from a preference file: a reward model, PPO against it, and what a second reward model thinks of the result.

    python examples/rlhf.py pandalm_preferences.jsonl

The pairs are split by prompt. A *proxy* reward model learns from one half, and PPO raises its score; a *gold* one
learns from the other half, and only watches. Where the proxy's score rises and the gold score does not, the policy has
found what the proxy gets wrong: L. Gao et al., *Scaling laws for reward model overoptimization*, 2023. The figure shows
both against √KL(π‖π_ref), the distance along which the paper's curves are simple.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from aligngym.agents import PPO
from aligngym.alignment import (
    CompletionsLog,
    LanguagePolicy,
    PromptSampler,
    RewardModel,
    Rewards,
    RewardTraining,
    TokenPreferences,
    default_lora,
    evaluate_completions,
    load_preferences,
    load_prompts,
)
from aligngym.core import Decay


def train_reward_model(options: argparse.Namespace, pairs: TokenPreferences, name: str, seed: int) -> Path:
    """Train a reward model, judge it on a tenth of the pairs, and return its folder."""
    train, held_back = pairs.hold_back(len(pairs) // 10, seed)
    model = RewardModel.for_training(options.model, lora=default_lora(16), dtype=options.dtype, seed=seed)
    steps = options.reward_epochs * -(-len(train) // 8)
    agent = RewardTraining(
        model, train, batch_size=8, learning_rate=Decay(options.reward_rate, steps, steps // 10), seed=seed
    )
    agent.learn(steps)
    judged = agent.evaluate(held_back)
    interval = f"[{judged['accuracy_low']:.2f}, {judged['accuracy_high']:.2f}]"
    print(f"{name}: accuracy {judged['accuracy']:.2f} {interval} on {len(held_back)} held-back pairs", flush=True)
    model.save(options.output / name)
    return options.output / name


def draw(records: list[dict[str, float]], path: Path) -> None:
    """Draw both scores, less what they were at the start, against the square root of the KL."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    distance = [max(record["kl"], 0.0) ** 0.5 for record in records]
    for name, label, colour in (
        ("proxy", "proxy, which PPO maximises", "#c44e52"),
        ("gold", "gold, which only watches", "#4c72b0"),
    ):
        start = records[0][name]
        axes.plot(distance, [record[name] - start for record in records], "o-", color=colour, label=label)
        low, high = ([record[f"{name}_{side}"] - start for record in records] for side in ("low", "high"))
        axes.fill_between(distance, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axes.set(
        xlabel="√KL(π‖π_ref), nats", ylabel="score, less the reference's", title="Over-optimisation of a reward model"
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def line(record: dict[str, float]) -> str:
    """Return a row of the table."""
    scores = [f"{record[n]:6.2f} [{record[f'{n}_low']:5.2f}, {record[f'{n}_high']:5.2f}]" for n in ("proxy", "gold")]
    return f"{record['iteration']:>9}  {scores[0]:>22}  {scores[1]:>22}  {record['kl']:6.2f}  {record['length']:6.1f}"


def main() -> None:
    """Train two reward models and a policy, and draw the curve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pairs", help="preference pairs: .jsonl, .csv, .parquet, or a Hub id")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=Path("runs/rlhf"))
    parser.add_argument("--reward-epochs", type=int, default=1)
    parser.add_argument("--reward-rate", type=float, default=2e-4)
    parser.add_argument("--iterations", type=int, default=60, help="of PPO (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="in an iteration (default: %(default)s)")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="completions computed at once")
    parser.add_argument("--beta", type=float, default=0.02, help="KL penalty (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--judge-every", type=int, default=10, help="iterations (default: %(default)s)")
    parser.add_argument("--judged", type=int, default=64, help="prompts to judge by (default: %(default)s)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    policy = LanguagePolicy.from_pretrained(options.model, critic=True, dtype=options.dtype)
    pairs = load_preferences(options.pairs, policy.tokenizer, drop_invalid=True, end_tokens=policy.end_tokens)
    first, second = pairs.hold_back(len(pairs) // 2, seed=0)
    proxy_folder = train_reward_model(options, first, "proxy", seed=1)
    gold_folder = train_reward_model(options, second, "gold", seed=2)

    # The proxy shares the policy's base model, as its critic and its reference do; the gold one stands apart.
    proxy = RewardModel.sharing(policy, proxy_folder, label="proxy")
    gold = RewardModel.from_pretrained(gold_folder, dtype=options.dtype, label="gold")
    rows = list({str(row["prompt"]): {"prompt": row["prompt"]} for row in load_prompts(options.pairs)}.values())
    judged, problems = rows[: options.judged], rows[options.judged :]
    decoding = {"max_new_tokens": options.max_new_tokens, "rows_at_once": 64}
    sampler = PromptSampler(
        problems, [proxy], group_size=1, prompts_per_sample=options.prompts, missing_end_penalty=1.0, **decoding
    )
    agent = PPO(
        policy,
        sampler,
        beta=options.beta,
        discount=1.0,
        trace=0.95,
        epochs=4,
        minibatch_size=None,
        micro_batch_size=options.micro_batch_size,
        value_coefficient=0.1,
        value_clip=0.2,
        normalise_advantages="batch",
        learning_rate=Decay(options.learning_rate, options.iterations, min(5, options.iterations)),
    )
    watchers = Rewards([proxy, gold], [1.0, 0.0])
    records = []
    print(f"{'iteration':>9}  {'proxy [95 %]':>22}  {'gold [95 %]':>22}  {'KL':>6}  {'tokens':>6}")
    for start in range(0, options.iterations + 1, options.judge_every):
        if start:
            log = CompletionsLog(sampler, every=options.judge_every, folder=options.output)
            agent.learn(options.judge_every, output=options.output, callbacks=[log], progress=False)
        found = evaluate_completions(policy, judged, watchers, greedy=False, seed=1, **decoding)
        record = {"iteration": start, "kl": found.kl, "length": found.policy["length"].value}
        for name in ("proxy", "gold"):
            estimate = found.policy[f"rewards/{name}"]
            record |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        records.append(record)
        print(line(record), flush=True)
        draw(records, options.output / "overoptimisation.png")
    policy.save(options.output / "adapter")
    print(f"adapter and figure in {options.output}")


if __name__ == "__main__":
    main()
