"""The slow, obvious way: plain autograd over the whole model, one objective and one sample at a time."""

import torch
from torch.nn import functional as F


def oriented(matrix, module, is_output):
    """A stored weight (or its gradient) with neurons as rows, `[parts * d_ff, d]`."""
    stores_in_out = type(module).__name__ == "Conv1D"
    return matrix if stores_in_out == is_output else matrix.t()


def saliencies(model, mlps, input_ids, attention_mask=None):
    """`{"fo": Q, "ce": [Q per sample]}`; Q = one list of `[d_ff, d]` per MLP.

    `mlps` lists, per layer, `(input modules, output module, parts of each input module)`.
    """
    modules = [m for inputs, output, _ in mlps for m in (*inputs, output)]
    weights = [m.weight for m in modules]
    for weight in weights:
        weight.requires_grad_(True)
    outputs = {}
    hooks = [m.register_forward_hook(lambda m, _, y: outputs.__setitem__(m, y)) for m in modules]
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    inputs = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
    logits = model(**inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()

    first_order = 0
    for ins, out, parts in mlps:
        for module in (*ins, out):
            y = outputs[module].reshape(*mask.shape, -1) * mask[..., None]
            for piece in y.chunk(1 if module is out else parts, dim=-1):
                first_order = first_order + torch.linalg.svdvals(piece.flatten(1)).mean()
    lengths = mask.sum(1)
    entropies = [F.cross_entropy(logits[s, : n - 1], input_ids[s, 1:n]) for s, n in enumerate(lengths)]

    def q(loss):
        gradients = dict(zip(modules, torch.autograd.grad(loss, weights, retain_graph=True)))
        found = []
        for ins, out, parts in mlps:
            rows = [oriented((m.weight * gradients[m]).detach(), m, False).chunk(parts) for m in ins]
            found.append(
                [
                    *(piece for pieces in rows for piece in pieces),
                    oriented((out.weight * gradients[out]).detach(), out, True),
                ]
            )
        return found

    result = {"fo": q(first_order), "ce": [q(loss) for loss in entropies]}
    for weight in weights:
        weight.requires_grad_(False)
    return result
