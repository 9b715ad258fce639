"""A language model learns to walk through a grid that it reads and answers in words; so does a table.

    python examples/text_grid_world.py --model smollm2-135m --iterations 60

The model sees a map and answers with a word, turn by turn, and is paid what the grid pays. First it imitates random
moves, to learn what an answer looks like and nothing of where to go; then GRPO, the class that also trains the table,
learns from the returns alone. The optimum is exact, and so is the return of random moves, which is where learning
begins: a *share* of 0 % is random, of 100 % optimal, and the *ratio* is return / optimal return.
"""

import argparse

import numpy as np

from aligngym.agents import GRPO, BehaviourCloning, EpisodeSampler
from aligngym.alignment import LanguagePolicy, default_lora
from aligngym.alignment.text_environment import TextEnvironmentSampler
from aligngym.core import TabularPolicy
from aligngym.envs.text_grid_world import NumberedText, TextGridWorld

MAP = "...\n.#.\n.FG"
SYSTEM_PROMPT = "You walk through a map. Answer with one word."


def main(options: argparse.Namespace) -> None:
    env = TextGridWorld(MAP, max_steps=options.max_steps, step_reward=-0.1, boundary_reward=-0.1, forbidden_reward=-0.5)
    chance, optimum = env.exact_return(np.full(env.mdp.rewards.shape, 0.25)), env.optimal_return
    policy = LanguagePolicy.from_pretrained(options.model, lora=default_lora(options.rank), dtype=options.dtype)
    policy.to(options.device)

    def sampler(episodes: int, **further) -> TextEnvironmentSampler:
        common = {"max_new_tokens": 6, "system_prompt": SYSTEM_PROMPT}
        return TextEnvironmentSampler(env, policy.tokenizer, episodes=episodes, **common, **further)

    def report(name: str, value: float, success: float | None = None, invalid: float | None = None) -> None:
        share, ratio = (value - chance) / (optimum - chance), value / optimum
        rates = "".join(f"{rate:10.0%}" if rate is not None else " " * 10 for rate in (success, invalid))
        print(f"{name:36}{value:+8.3f}{share:9.0%}{ratio:9.0%}{rates}", flush=True)

    def judge(name: str) -> None:
        for how, greedy in (("drawn", False), ("most probable", True)):
            judged = sampler(options.judged, greedy=greedy)
            judged.sample(policy, seed=10**6)
            metrics = judged.metrics
            report(f"{name}, {how}", metrics["return"], metrics["success"], metrics["invalid"])

    print(env.reset(seed=0)[0], end="\n\n")
    print(f"{'':36}{'return':>8}{'share':>9}{'ratio':>9}{'success':>10}{'invalid':>10}")
    report("random moves, exactly", chance)
    judge("model")

    generator = np.random.default_rng(0)
    walks = sampler(options.walks).demonstrations(policy, lambda text: str(generator.choice(env.words)), seed=0)
    batch = min(16, options.walks)
    cloning = BehaviourCloning(
        policy, walks, batch_size=batch, micro_batch_size=options.micro_batch_size, learning_rate=options.cloning_rate
    )
    cloning.learn(options.cloning_steps, progress=options.progress)
    judge("after imitating random moves")

    agent = GRPO(
        policy,
        sampler(options.episodes, group_size=options.group_size),
        learning_rate=options.learning_rate,
        micro_batch_size=options.micro_batch_size,
    )
    agent.learn(options.iterations, progress=options.progress, output=options.output)
    judge("after GRPO")

    states = NumberedText(env)
    episodes = EpisodeSampler(states, episodes=options.episodes, group_size=options.group_size)
    table = GRPO(TabularPolicy.for_env(states), episodes, learning_rate=0.3)
    table.learn(options.iterations, progress=False)
    report("a table after GRPO, exactly", env.exact_return(table.policy.probability_table().cpu()))
    report("optimum, exactly", optimum)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--model", default="smollm2-135m", help="a Hub id, a folder, a .gguf file, or smollm2-135m")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--dtype", default="auto", help="of the frozen weights")
    made.add_argument("--rank", type=int, default=16, help="of the adapter")
    made.add_argument("--max-steps", type=int, default=6, help="answers in an episode")
    made.add_argument("--iterations", type=int, default=60, help="of GRPO")
    made.add_argument("--episodes", type=int, default=64, help="of an iteration")
    made.add_argument("--group-size", type=int, default=8, help="episodes that share a start")
    made.add_argument("--learning-rate", type=float, default=3e-4, help="of GRPO")
    made.add_argument("--walks", type=int, default=64, help="random walks to imitate")
    made.add_argument("--cloning-steps", type=int, default=40, help="gradient steps of imitation")
    made.add_argument("--cloning-rate", type=float, default=5e-4, help="learning rate of imitation")
    made.add_argument("--judged", type=int, default=128, help="episodes in which a policy is judged")
    made.add_argument("--micro-batch-size", type=int, default=16, help="episodes computed at once")
    made.add_argument("--output", help="a folder for metrics")
    made.add_argument("--progress", action="store_true", help="show a progress bar")
    return made


if __name__ == "__main__":
    main(parser().parse_args())
