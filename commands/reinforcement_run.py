"""What ``aligngym grpo`` and ``aligngym ppo`` share: prompts, rewards, how completions are drawn, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligngym.commands.adapter_run import CONFIG, PolicyOptions, train_adapter
from aligngym.commands.options import option

if TYPE_CHECKING:
    from aligngym.agents import PolicyGradient
    from aligngym.alignment import LanguagePolicy, PromptSampler, Rewards


@dataclass
class ReinforcementOptions(PolicyOptions):
    """Of a run that learns from rewards of completions."""

    positive = (*PolicyOptions.positive, "group_size", "max_new_tokens", "passes", "minibatches", "eval_size")
    sources = ("train", "eval")

    train: str | None = option(None, "prompts with what rewards need: .json, .jsonl, .csv, .parquet file, or Hub id")
    batch_size: int = option(8, "prompts per iteration, on all devices together; --group-size completions of each")
    learning_rate: float = option(5e-5, "peak learning rate")
    epochs: float = option(1.0, "passes over the prompts")
    max_steps: int | None = option(None, "iterations in all, instead of --epochs")
    eval: str | None = option(None, "prompts to judge by; without it, some of --train are held back")
    eval_size: int = option(100, "prompts held back for evaluation, at most a fifth of --train")
    rewards: str | None = option(None, "reward functions, as in final_answer:1,think_format:0.2,my.py:function:0.5")
    reward_model: str | None = option(None, "folder that aligngym reward has written; its score is one more reward")
    reward_model_weight: float = option(1.0, "weight of that score")
    system_prompt: str | None = option(None, "message before every conversation")
    group_size: int = option(8, "completions of each prompt")
    max_new_tokens: int = option(128, "most tokens of a completion")
    temperature: float = option(1.0, "of the policy: it acts, and is trained, at this temperature")
    top_k: int = option(0, "draw among so many most probable tokens only; 0: all")
    top_p: float = option(1.0, "draw among the most probable tokens that have this probability together")
    stop: str | None = option(None, "a text that ends a completion")
    missing_end_penalty: float = option(0.0, "taken off the reward of completions that come to no end")
    refills: int = option(0, "how often groups without a signal are replaced by further prompts (dynamic sampling)")
    rows_at_once: int | None = option(None, "completions written together, which bounds memory; default: all")
    beta: float = option(0.0, "strength of the KL penalty towards the reference, reward per nat")
    kl: str = option("reward", "where the penalty is: in the reward, or a loss", ("reward", "k2", "k3"))
    kl_target: float | None = option(None, "nats: adapt the penalty, from --beta on, so that the KL stays about this")
    kl_horizon: float = option(10_000.0, "completions over which it adapts")
    importance_cap: float | None = option(None, "largest weight of actions drawn in other numerics than trained in")
    passes: int = option(1, "how often an iteration goes over its completions")
    minibatches: int = option(1, "gradient steps in each pass")
    show_every: int = option(10, "iterations between two looks at completions; 0: never")
    show: int = option(2, "completions to show each time")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train is not None and not (self.rewards or self.reward_model):
            raise ValueError("nothing rewards the completions: give --rewards, --reward-model, or both")
        if self.kl_target is not None and not self.beta > 0:
            raise ValueError("--kl-target adapts a penalty that begins at --beta: give a positive one")

    def read_rewards(self, policy: LanguagePolicy) -> Rewards:
        """Return the reward functions, and the reward model's score if there is one."""
        from aligngym.alignment import RewardModel, Rewards

        given = [Rewards.parse(self.rewards)] if self.rewards else []
        if self.reward_model is not None:
            # An adapter shares the policy's own base model, so that all roles fit in the memory of one.
            is_adapter = (Path(self.reward_model) / "adapter_config.json").is_file()
            model = (
                RewardModel.sharing(policy, self.reward_model)
                if is_adapter
                else RewardModel.from_pretrained(self.reward_model)
            )
            given.append(Rewards([model], [self.reward_model_weight], names=["reward_model"]))
        return Rewards.together(given)

    def split_problems(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """Return the prompts to train on, and those to judge by."""
        import torch

        from aligngym.alignment import load_prompts
        from aligngym.core.randomness import derived_seed

        rows = load_prompts(str(self.train), system_prompt=self.system_prompt)
        if self.eval:
            return rows, load_prompts(self.eval, system_prompt=self.system_prompt)
        size = min(self.eval_size, max(1, len(rows) // 5))
        if size == len(rows):
            raise ValueError(f"{self.train} has a single prompt: give --eval others to judge by")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(derived_seed(self.seed))).tolist()
        return [rows[number] for number in sorted(order[size:])], [rows[number] for number in sorted(order[:size])]

    def sampler(self, problems: Sequence[Any], rewards: Rewards) -> PromptSampler:
        """Return what draws completions of the problems."""
        from aligngym.alignment import PromptSampler

        return PromptSampler(
            problems,
            rewards,
            group_size=self.group_size,
            prompts_per_sample=self.batch_size,
            missing_end_penalty=self.missing_end_penalty,
            refills=self.refills,
            rows_at_once=self.rows_at_once,
            seed=self.seed,
            **self.decoding,
        )

    @property
    def decoding(self) -> dict[str, Any]:
        """How completions are drawn."""
        stop = (self.stop,) if self.stop else ()
        return {"max_new_tokens": self.max_new_tokens, "top_k": self.top_k, "top_p": self.top_p, "stop": stop}

    def policy_gradient(self, steps: int) -> dict[str, Any]:
        """Return what every :class:`PolicyGradient` agent is given."""
        from aligngym.agents import AdaptiveKL

        rows = self.batch_size * self.group_size
        beta = self.beta if self.kl_target is None else AdaptiveKL(self.beta, self.kl_target, self.kl_horizon)
        return self.optimisation(steps) | {
            "micro_batch_size": self.micro_batch_size(-(-rows // self.minibatches)),
            "minibatch_size": None if self.minibatches == 1 else -(-rows // self.minibatches),
            "epochs": self.passes,
            "discount": 1.0,
            "beta": beta,
            "kl": self.kl,
            "measure_kl": True,
            "importance_cap": self.importance_cap,
        }


def run_reinforcement(
    options: ReinforcementOptions, kind: type[PolicyGradient], *, resume: bool, critic: bool = False, **settings: Any
) -> int:
    """Train an adapter with a policy-gradient agent, save it, and report what the rewards say before and after.

    Args:
        options: of the run.
        kind: the agent.
        resume: whether to continue.
        critic: whether the policy has one.
        settings: of the agent, besides those that all have.
    """
    from aligngym.alignment import CompletionsLog

    problems, held_back = options.split_problems()
    policy = options.load_policy(critic=critic, temperature=options.temperature)
    rewards = options.read_rewards(policy)
    sampler = options.sampler(problems, rewards)
    sampler.prepare(policy)
    steps = options.steps(len(problems))
    agent = kind(policy, sampler, **options.policy_gradient(steps) | settings)
    log = CompletionsLog(sampler, every=max(1, options.show_every), count=options.show, folder=options.folder)
    judged_by = ", ".join(f"{weight:g} {name}" for name, weight in zip(rewards.names, rewards.weights, strict=True))
    train_adapter(
        agent,
        policy,
        options,
        steps,
        resume=resume,
        batch=f"{options.batch_size} prompts × {options.group_size} completions",
        facts={
            "prompts": f"{len(problems)} to train on, {len(held_back)} to judge by ({options.eval or 'held back'})",
            "rewards": judged_by,
        },
        callbacks=[log] if options.show_every else [],
    )
    if agent.is_main_process:
        _report(options, policy, held_back, rewards)
    return 0


def _report(options: ReinforcementOptions, policy: LanguagePolicy, problems: Sequence[Any], rewards: Rewards) -> None:
    """Print and write what the rewards say of the policy and of its reference on prompts that were held back."""
    from aligngym.alignment import evaluate_completions
    from aligngym.commands.evaluate_language_model import completions_table

    decoding = options.decoding | {"rows_at_once": options.rows_at_once or 64}
    tables = [
        completions_table(
            evaluate_completions(policy, problems, rewards, greedy=greedy, seed=options.seed, **decoding),
            f"{len(problems)} prompts, {'greedy' if greedy else 'drawn'} [95 %]",
        )
        for greedy in (True, False)
    ]
    text = "\n\n".join(tables)
    print(f"\n{text}")
    options.folder.joinpath("report.txt").write_text(f"{text}\n", encoding="utf-8")
    print(
        f"\nadapter         {options.folder / 'adapter'}  (peft's format, with the tokenizer)\n"
        f"completions     {options.folder / 'completions.jsonl'}\n"
        f"metrics         {options.folder / 'metrics.jsonl'}, tensorboard --logdir {options.folder}\n"
        f"the same again  aligngym {options.command} --config {options.folder / CONFIG} --output ANOTHER"
    )
