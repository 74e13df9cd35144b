"""The Bradley–Terry loss of a reward model, for answers that may be uncertain.

Shapes: B pairs.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    probability: Tensor,
    weight: Tensor,
    margin: Tensor | None = None,
    center_coef: float = 0.0,
) -> Tensor:
    """Mean over B of weight · (−p log σ(z) − (1 − p) log σ(−z)), where z = chosen − rejected − margin; nats.

    With p = 1 this is −log σ(chosen − rejected) (Stiennon et al. 2020, sec. 3.4), with a margin as in Llama 2 (Touvron
    et al. 2023, eq. 2). A tie (p = 0.5) pulls the two scores together. The loss is least at chosen − rejected =
    margin + log(p / (1 − p)).

    A reward model's scores are known up to a constant: ``center_coef`` · (chosen + rejected)², in the mean, holds them
    around 0 (Eisenstein et al. 2023, sec. 4).

    Args:
        chosen, rejected: [B] raw scores.
        probability: [B] P(the chosen one is preferred).
        weight: [B], of mean 1 over the data set, so that the mean over any batch of it is an unbiased estimate.
        margin: [B] by how much the chosen one is better, in units of the score.
    """
    difference = chosen - rejected
    logits = difference if margin is None else difference - margin
    loss = (weight * binary_cross_entropy_with_logits(logits, probability, reduction="none")).mean()
    if center_coef:
        loss = loss + center_coef * ((chosen + rejected) ** 2).mean()
    return loss
