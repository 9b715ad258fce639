"""Completions written by a vLLM server, for those who have one: faster, and otherwise as the policy writes itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from aligngym.alignment.data import pad_tokens
from aligngym.alignment.generation import Decoding, completion_rows
from aligngym.alignment.language_policy import LanguagePolicy
from aligngym.core.randomness import derived_seed, evaluating
from aligngym.core.trajectories import Trajectories

#: Prompts that the server is asked about at a time.
REQUESTS = 64


class VLLMWriter:
    r"""Writes completions on a vLLM server; called as :meth:`LanguagePolicy.generate` is, with the policy first.

    **This has not been run against a server.** Tests hold it against a stand-in for trl's client. Start one with

    .. code-block:: console

        $ VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs \
              --weight-transfer-config '{"backend": "nccl"}'

    or, the same for short, ``trl vllm-serve --model MODEL``, on another CUDA device than the one that trains.

    Before the first completions, and after every change of the adapter, the weights with the adapter added go to the
    server, all of them, and what it remembers of prompts is dropped. Tokens go there and come back as numbers, so no
    text is tokenised twice.

    Log-probabilities are asked for as *processed*: those of the distribution that a token was drawn from, after
    temperature, top-k and top-p, as :meth:`LanguagePolicy.generate` gives them. A server that gives *raw* ones, vLLM's
    default, is refused. Either way they are computed in another engine's numerics than the policy's: give agents an
    ``importance_cap``, such as 2 (see :class:`~aligngym.agents.PolicyGradient`), so that the policy is asked for
    log π_old itself and the difference is weighed.

    For one training process: on several devices each would have to wait for the one that sends the weights.

    Args:
        base_url: of the server.
        timeout: seconds to wait for it.
        group_port: of the group through which weights are sent.
        client: instead of trl's ``VLLMClient``, something that does the same.

    Raises:
        ImportError: if vLLM is not installed, which trl's client needs.
        ValueError: if the server gives raw log-probabilities.
    """

    def __init__(
        self,
        base_url: str = "http://localhost:8000",
        *,
        timeout: float = 240.0,
        group_port: int = 51216,
        client: Any = None,
    ) -> None:
        if client is None:
            from trl.generation.vllm_client import VLLMClient

            client = VLLMClient(base_url=base_url, group_port=group_port, connection_timeout=timeout)
        mode = client.get_server_info()["model_config"]["logprobs_mode"]
        if mode != "processed_logprobs":
            raise ValueError(
                f"the vLLM server gives {mode}, not the log-probabilities of what tokens are drawn from: start it with "
                "--logprobs-mode processed_logprobs"
            )
        self.client = client
        self._connected = False
        # What the server has: of which policy, and with which adapter.
        self._policy: Callable[[], LanguagePolicy | None] = lambda: None
        self._sent: dict[str, Tensor] | None = None

    @torch.no_grad()
    def __call__(
        self,
        policy: LanguagePolicy,
        prompts: Sequence[Tensor],
        *,
        completions: int = 1,
        seed: int = 0,
        rows_at_once: int | None = None,
        **decoding: Any,
    ) -> Trajectories:
        """Let the server complete prompts as the policy would; see :meth:`LanguagePolicy.generate`.

        Args:
            policy: whose weights the server is to have.
            prompts: N prompts, token ids of any lengths.
            completions: k, of every prompt.
            seed: of the samples; a server that batches requests as they come in need not repeat them to the bit.
            rows_at_once: taken for the likeness of calls; the server itself decides.
            decoding: of :class:`~aligngym.alignment.generation.Decoding`.

        Raises:
            ValueError: without a prompt or for an empty one; on several processes; if the adapter cannot be added to
                the weights; or if the server's answer is not about these prompts, or lacks log-probabilities.
        """
        how = Decoding(**decoding)
        if not len(prompts) or not all(map(len, prompts)):
            raise ValueError("there is no prompt" if not len(prompts) else "a prompt has no tokens")
        if PartialState().num_processes > 1:
            raise ValueError("a vLLM server is kept up to date by one training process, and there are several")
        self.update(policy)

        def ask(number: int) -> dict[str, Any]:
            return self._ask(policy, prompts[number].tolist(), completions, how, derived_seed(seed, number))

        with ThreadPoolExecutor(REQUESTS) as threads:
            answers = list(threads.map(ask, range(len(prompts))))
        rows = _as_trajectories(policy, prompts, answers, completions, how).to(policy.device)
        if how.greedy and policy.temperature != 1:
            # Greedily, vLLM knows of no temperature.
            with evaluating(policy):
                rows.log_probs = policy(rows).log_probs
        return rows

    def update(self, policy: LanguagePolicy) -> None:
        """Send the weights with the active adapter added, if they are not what the server has.

        Raises:
            ValueError: if the adapter cannot be added.
        """
        state = policy.trainable_state()
        if self._sent is not None and self._policy() is policy and _same(self._sent, state):
            return
        if not self._connected:
            self.client.init_communicator(device=policy.device)
            self._connected = True
        # While weights are under way, the server has neither the old ones nor the new.
        self._sent = None
        with policy.merged_adapter():
            weights = dict(_plain_weights(policy))
            metadata = [(name, str(x.dtype).removeprefix("torch."), list(x.shape)) for name, x in weights.items()]
            self.client.update_named_params(metadata, iter(weights.items()))
        # What it computed of prompts with the old weights would be mixed with the new ones.
        self.client.reset_prefix_cache()
        self._sent, self._policy = {name: value.clone() for name, value in state.items()}, weakref.ref(policy)

    def _ask(
        self, policy: LanguagePolicy, prompt: list[int], completions: int, how: Decoding, seed: int
    ) -> dict[str, Any]:
        """Return the server's completions of one prompt: one request each, because the seed belongs to a request."""
        answer = self.client.generate(
            [prompt],
            n=completions,
            temperature=0.0 if how.greedy else policy.temperature,
            top_p=1.0 if how.greedy else how.top_p,
            top_k=0 if how.greedy else how.top_k,
            max_tokens=how.max_new_tokens,
            logprobs=0,
            generation_kwargs={
                "seed": seed,
                "stop": list(how.stop),
                "include_stop_str_in_output": True,
                "stop_token_ids": policy.end_tokens,
            },
        )
        if answer["prompt_ids"] != [prompt] or len(answer["completion_ids"]) != completions:
            raise ValueError(
                f"the vLLM server completed {len(answer['completion_ids'])} times {answer['prompt_ids']}, and was "
                f"asked to complete {completions} times {[prompt]}"
            )
        return answer


def _plain_weights(policy: LanguagePolicy) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's own weights under its own names, as they are without peft's layers around them."""
    causal = policy.causal_model
    for name, layer in causal.named_modules():
        if isinstance(layer, BaseTunerLayer) and not layer.merged:
            raise ValueError(
                f"the adapter on {name} cannot be added to the weights, so a server would never see it: of the kinds "
                "of adapters, plain LoRA on linear layers that are not tied to others can"
            )
    for name, parameter in causal.named_parameters():
        # Of a layer that is trained as a whole, peft keeps the original beside the copy of every adapter.
        if ".original_module." in name or ".lora_" in name:
            continue
        yield name.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."), parameter.data


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _as_trajectories(
    policy: LanguagePolicy,
    prompts: Sequence[Tensor],
    answers: Sequence[dict[str, Any]],
    completions: int,
    how: Decoding,
) -> Trajectories:
    """Return the server's answers as rows; the server's own reasons for stopping do not come through trl's client."""
    written = [tokens for answer in answers for tokens in answer["completion_ids"]]
    actions = pad_tokens([torch.tensor(tokens) for tokens in written])
    log_probs = torch.zeros(actions.shape)
    logged = [
        dict(zip(ids, values, strict=True))
        for answer in answers
        for row in zip(answer["logprob_token_ids"] or [], answer["logprobs"] or [], strict=True)
        for ids, values in zip(*row, strict=True)
    ]
    remaining = iter(logged)
    for row, tokens in enumerate(written):
        for t, token in enumerate(tokens):
            value = next(remaining, {}).get(token)
            if value is None:
                raise ValueError(f"the vLLM server gave no log-probability of token {token}, number {t} of row {row}")
            log_probs[row, t] = value
    ended = torch.tensor([_has_ended(policy, tokens, how) for tokens in written])
    return completion_rows(pad_tokens([prompt.cpu() for prompt in prompts], side="left"), actions, log_probs, ended)


def _has_ended(policy: LanguagePolicy, tokens: list[int], how: Decoding) -> bool:
    if tokens[-1] in policy.end_tokens:
        return True
    return any(text in policy.tokenizer.decode(tokens) for text in how.stop)
