"""Two new algorithms by subclassing, a few lines each, beside their own optima.

    python examples/new_agent.py

Expected Sarsa is a temporal-difference method with another value of the next state. The exponential loss makes another
preference algorithm with another optimum; it trains a table here, and would train an adapter on a language model as it
stands.
"""

import torch

from aligngym.agents import QLearning, ValueIteration
from aligngym.agents.temporal_difference import TDControl
from aligngym.alignment import DPO
from aligngym.core import Decay, TabularPolicy
from aligngym.core.compilation import compiled
from aligngym.envs import GridWorld, TokenMDP, bradley_terry_preferences


class ExpectedSarsa(TDControl):
    """The next state is worth the mean of Q under the ε-greedy behaviour (R. Sutton and A. Barto, section 6.6)."""

    @staticmethod
    @compiled
    def next_value(values, next_action, epsilon):
        return (1 - epsilon) * max(values) + epsilon * sum(values) / len(values)


class ExponentialDPO(DPO):
    """DPO with boosting's loss, exp(−βh): Y. Tang et al., *Generalized preference optimization*, 2024, table 1.

    On Bradley–Terry preferences its minimum is at βh = half the difference of rewards: it regularises twice as much.
    """

    def preference_losses(self, scores):
        chosen, rejected = scores
        return torch.exp(-self.beta * (chosen - rejected))


def main() -> None:
    env = GridWorld(step_reward=-0.1)
    exact = ValueIteration(env, discount=0.9).learn(progress=False)
    start = float(exact.mdp.initial @ exact.values)
    print(f"a grid world whose optimal return is {start:.4f}")
    for kind in (QLearning, ExpectedSarsa):
        agent = kind(env, discount=0.9, step_size=0.5, epsilon=0.5).learn(3000, progress=False)
        print(f"  {kind.__name__:14} {agent.evaluate(env, episodes=100)['return']:.4f} after 3000 episodes")

    words = TokenMDP(lambda tokens: float(sum(tokens)), vocabulary_size=3, length=3)
    sequences = words.all_trajectories()
    preferences = bradley_terry_preferences(sequences)
    print("the probability of the best of 27 sequences")
    for kind, beta in ((DPO, 1.0), (ExponentialDPO, 2.0)):
        optimum = (sequences.returns / beta).softmax(dim=0)
        policy = TabularPolicy(words.mdp.num_states, words.vocabulary_size)
        agent = kind(policy, preferences, beta=1.0, batch_size=len(preferences), learning_rate=Decay(0.1, 200))
        agent.learn(200, progress=False)
        learned = policy(sequences).log_probs.sum(dim=1).exp()
        print(f"  {kind.__name__:14} {learned[-1]:.6f} learned, {optimum[-1]:.6f} at its optimum")


if __name__ == "__main__":
    main()
