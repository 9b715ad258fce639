import pytest
import torch

from aligngym.alignment import adapters

PROMPTS = [torch.tensor(tokens) for tokens in ([5, 6, 7, 8, 9, 10], [20], [30, 31, 32])]


def _name_of(policy, parameter):
    return next(name for name, other in policy.named_parameters() if other is parameter)


class TestAdapters:
    def test_merging_says_the_same_and_leaves_every_bit_as_it_was(self, tiny_policy):
        policy = tiny_policy()
        tokens = torch.arange(1, 9)[None]
        weights = {name: parameter.clone() for name, parameter in policy.named_parameters()}
        flags = [parameter.requires_grad for parameter in policy.parameters()]
        with torch.no_grad():
            before = policy.model(tokens).logits
            with policy.merged_adapter():
                layer = policy.causal_model.model.layers[0].self_attn.q_proj
                assert layer.merged
                assert not torch.equal(layer.base_layer.weight, weights[_name_of(policy, layer.base_layer.weight)])
                merged = policy.model(tokens).logits
            after = policy.model(tokens).logits
        torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-4)
        assert torch.equal(after, before)
        assert not layer.merged
        assert all(torch.equal(weights[name], parameter) for name, parameter in policy.named_parameters())
        assert flags == [parameter.requires_grad for parameter in policy.parameters()]

    def test_a_head_tied_to_the_embeddings_is_not_merged(self, tiny_policy):
        policy = tiny_policy(lora={"target_modules": ["lm_head", "q_proj"]})
        rows = policy.generate(PROMPTS, max_new_tokens=6)
        torch.testing.assert_close(rows.log_probs, policy(rows).log_probs.detach(), rtol=1e-4, atol=1e-4)

    def test_no_adapter_for_a_block_and_gradients_required_as_before(self, tiny_policy):
        policy = tiny_policy()
        tokens = torch.arange(1, 9)[None]
        flags = [parameter.requires_grad for parameter in policy.parameters()]
        with torch.no_grad():
            own = policy.model(tokens).logits
            with policy.using_adapter(None):
                assert flags == [parameter.requires_grad for parameter in policy.parameters()]
                without = policy.model(tokens).logits
            assert not torch.allclose(own, without)
            assert torch.equal(policy.model(tokens).logits, own)
        assert flags == [parameter.requires_grad for parameter in policy.parameters()]

    def test_an_error_inside_leaves_the_adapter_at_work(self, tiny_policy):
        policy = tiny_policy()
        tokens = torch.arange(1, 9)[None]
        with torch.no_grad():
            own = policy.model(tokens).logits
            for context in (policy.using_adapter(None), policy.merged_adapter()):
                with pytest.raises(KeyError), context:
                    raise KeyError
                assert torch.equal(policy.model(tokens).logits, own)

    def test_the_weights_stay_where_they_are(self, tiny_policy):
        policy = tiny_policy()
        places = [parameter.data_ptr() for parameter in policy.parameters()]
        with policy.merged_adapter():
            assert places == [parameter.data_ptr() for parameter in policy.parameters()]
        assert places == [parameter.data_ptr() for parameter in policy.parameters()]

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_rollouts_leave_every_bit_as_it_was(self, tiny_policy, dtype):
        policy = tiny_policy(dtype=dtype)
        weights = {name: parameter.clone() for name, parameter in policy.named_parameters()}
        policy.generate(PROMPTS, completions=2, max_new_tokens=6)
        policy.generate(PROMPTS, completions=2, max_new_tokens=6, reference=True)
        assert all(torch.equal(weights[name], parameter) for name, parameter in policy.named_parameters())

    @pytest.mark.parametrize("where", ["while it merges", "while it writes"])
    def test_so_do_those_that_fail(self, tiny_policy, monkeypatch, where):
        policy = tiny_policy()
        weights = {name: parameter.clone() for name, parameter in policy.named_parameters()}
        calls = []

        def fails(*arguments):
            calls.append(arguments)
            if len(calls) == 5:
                raise MemoryError
            return own(*arguments)

        if where == "while it merges":
            own = adapters._add
            monkeypatch.setattr(adapters, "_add", fails)
        else:
            own = policy.causal_model.lm_head.forward
            monkeypatch.setattr(policy.causal_model.lm_head, "forward", fails)
        with pytest.raises(MemoryError):
            policy.generate(PROMPTS, max_new_tokens=9)
        assert all(torch.equal(weights[name], parameter) for name, parameter in policy.named_parameters())
        assert not any(getattr(module, "merged", False) for module in policy.modules())
