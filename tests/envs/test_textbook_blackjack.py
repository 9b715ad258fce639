import gymnasium
import numpy as np
import pytest

from aligngym.agents import PolicyIteration
from aligngym.envs.blackjack import HIT, STICK, Blackjack, add_card, dealer_results
from aligngym.envs.numbered_states import NumberedStates

RULES = [{"sab": True}, {"sab": False}, {"sab": False, "natural": True}]


@pytest.fixture(scope="module")
def game():
    return Blackjack()


def test_the_dealers_published_chances():
    # Infinite deck, dealer stands on every 17: chance to bust by the card that shows, 2 … 10 and ace.
    published = [0.3536, 0.3739, 0.3945, 0.4164, 0.4232, 0.2623, 0.2447, 0.2284, 0.2121, 0.1153]
    chances = [dealer_results(*add_card(0, False, card)) for card in (*range(2, 11), 1)]
    np.testing.assert_allclose([results[5] for results in chances], published, atol=6e-5)
    np.testing.assert_allclose(np.sum(chances, axis=1), 1)


def test_the_value_published_for_one_state(game):
    # R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., example 5.4: the dealer shows a deuce, the player has 13
    # with a usable ace and sticks on 20 or 21. The book's −0.27726 is the mean of 10⁸ returns of standard deviation
    # below 1, so three standard errors are 3 · 10⁻⁴.
    policy = np.tile([0.0, 1.0], (716, 1))
    for card in range(1, 11):
        for total, ace in ((20, False), (21, False), (20, True), (21, True)):
            policy[game.number(total, card, ace)] = [1, 0]
        policy[game.number(21, card, True, natural=True)] = [1, 0]
    assert game.mdp.evaluate(policy, 1.0)[game.number(13, 2, True)] == pytest.approx(-0.27726, abs=3e-4)


def test_the_published_optimal_policy(game):
    # Figure 5.2: the least sum to stick on, by the dealer's card from ace to 10. It is Thorp's basic strategy but for
    # the notch at the ace with a usable ace.
    agent = PolicyIteration(game, 1.0).learn(progress=False)
    advantage = agent.action_values[:, STICK] - agent.action_values[:, HIT]
    published = {False: [17, 13, 13, 12, 12, 12, 17, 17, 17, 17], True: [19, 18, 18, 18, 18, 18, 18, 18, 19, 19]}
    for ace, least in published.items():
        for card, threshold in enumerate(least, start=1):
            for total in range(12, 22):
                assert (advantage[game.number(total, card, ace)] > 0) == (total >= threshold), (total, card, ace)


@pytest.mark.parametrize("rules", RULES)
def test_the_game_is_the_models(rules):
    game = Blackjack(**rules)
    game.mdp.check_model(game, samples=2500, seed=3)


@pytest.mark.parametrize("rules", RULES)
def test_naturals_pay_by_the_rules(rules):
    game = Blackjack(**rules)
    # Natural against a ten: the dealer has a natural with probability 1/13.
    ace = 1 / 13
    twenty_one = dealer_results(10, False)[4]
    expected = {
        (True, False): (1 - ace) * 1.0,
        (False, False): 1 - twenty_one,
        (False, True): 1.5 * (1 - twenty_one),
    }[game.sab, game.natural]
    state = game.number(21, 10, True, natural=True)
    assert game.mdp.rewards[state, STICK] == pytest.approx(expected)
    # Against the simulator: the mean of n returns of standard deviation below 1 is within 5 / √n.
    game.reset(seed=11)
    returns = []
    for _ in range(1500):
        assert game.reset(options={"state": state}) == (state, {})
        returns.append(game.step(STICK)[1])
    assert abs(np.mean(returns) - expected) < 5 / np.sqrt(1500)
    # Other hands of 21 are no naturals, whatever the rules.
    for usable in (False, True):
        assert game.mdp.rewards[game.number(21, 10, usable), STICK] == pytest.approx(1 - twenty_one)


def test_every_hand_can_be_started_with(game):
    hands = np.flatnonzero(~game.mdp.terminal)
    assert len(hands) == 10 * (18 + 10 + 1)
    game.reset(seed=0)
    for hand in hands:
        assert game.reset(options={"state": int(hand)})[0] == hand
    # The dealer's hidden card is dealt anew.
    hidden = {(game.reset(options={"state": game.number(15, 6)}), game.game.dealer[1])[1] for _ in range(200)}
    assert hidden == set(range(1, 11))
    with pytest.raises(ValueError, match="state 715 is no hand to start with"):
        game.reset(options={"state": game.end})


def test_hands_that_do_not_exist_have_no_number(game):
    for arguments in ((22, 1), (3, 1), (11, 1, True), (15, 0), (15, 11)):
        with pytest.raises(ValueError, match="no hand with"):
            game.number(*arguments)
    with pytest.raises(ValueError, match="no hand with a natural"):
        game.number(20, 5, True, natural=True)
    with pytest.raises(ValueError, match="no hand with a natural"):
        game.number(21, 5, natural=True)
    with pytest.raises(ValueError, match="neither 0 stick nor 1 hit"):
        game.step(2)


def test_observations_are_numbered_as_gymnasiums(game):
    theirs = NumberedStates(gymnasium.make("Blackjack-v1", sab=True))
    assert theirs.observation_space.n == 704
    for seed in range(50):
        number, _ = theirs.reset(seed=seed)
        state, _ = game.reset(seed=seed)
        assert theirs.digits(number) == theirs.unwrapped._get_obs()
        assert state == (
            game.naturals + theirs.digits(number)[1] if sorted(theirs.unwrapped.player) == [1, 10] else number
        )
        after, reward, terminated, *_ = theirs.step(HIT)
        assert game.step(HIT)[:3] == (game.end if terminated else after, reward, terminated)


class Showing(gymnasium.Env):
    """Shows one observation, of any space."""

    action_space = gymnasium.spaces.Discrete(1)

    def __init__(self, space, observation=None):
        self.observation_space, self.shown = space, observation

    def reset(self, *, seed=None, options=None):
        return self.shown, {}


def test_numbers_count_through_every_observation_once():
    spaces = gymnasium.spaces
    nested = spaces.Tuple(
        (spaces.Discrete(3, start=-1), spaces.Tuple((spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2))))
    )
    env = NumberedStates(Showing(nested))
    assert env.observation_space.n == 3 * 2 * 3 * 4
    digits = [env.digits(number) for number in range(72)]
    assert digits[0] == (-1, 0, 0, 0, 0)
    assert digits[1] == (-1, 0, 0, 0, 1)
    assert digits[71] == (1, 1, 2, 1, 1)
    assert len(set(digits)) == 72
    for number, (first, *pair, third, fourth) in enumerate(digits):
        env.env.shown = (first, (np.array(pair), np.array([third, fourth], dtype=np.int8)))
        assert env.reset()[0] == number


def test_what_cannot_be_numbered_is_refused():
    with pytest.raises(TypeError, match="cannot be numbered"):
        NumberedStates(gymnasium.make("CartPole-v1"))
    env = NumberedStates(Showing(gymnasium.spaces.MultiDiscrete([2, 2]), np.array([0, 2])))
    with pytest.raises(ValueError, match="no observation of"):
        env.reset()
    with pytest.raises(ValueError, match="state 4 is not one of 0 … 3"):
        env.digits(4)
