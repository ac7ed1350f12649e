"""A linear-chain conditional random field on top of a token classifier (Lafferty et al., 2001).

The module only holds the parameters; likelihood and decoding are functions of what its forward returns, so
that they can be used where ZeRO-3 has taken the parameters apart again.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

IGNORED = -100
FORBIDDEN = -1e4
FILE = "crf.safetensors"
# In a tokenizer's description: it tells the begin of a word by a space.
BYTE_LEVEL = '"ByteLevel"'

Scores = tuple[Tensor, Tensor, Tensor, Tensor]
"""Emissions (batch, length, labels); transitions (from, to); scores of the first and of the last label."""


class LinearChainCRF(nn.Module):
    """Scores of label sequences beyond each token's own: transitions, first and last labels."""

    def __init__(self, labels: tuple[str, ...], allowed: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
        """Begin without any preference.

        Args:
            labels: the label words, by number.
            allowed: bool (from, to), (first,), (last,): sequences outside get a score of -10,000 a step.
        """
        super().__init__()
        size = len(labels)
        self.labels = tuple(labels)
        self.transitions = nn.Parameter(torch.zeros(size, size))
        self.starts = nn.Parameter(torch.zeros(size))
        self.ends = nn.Parameter(torch.zeros(size))
        self.is_constrained = allowed is not None
        for name, mask in zip(("transition", "start", "end"), allowed or (), strict=False):
            self.register_buffer(f"{name}_bias", torch.where(mask, 0.0, FORBIDDEN), persistent=False)

    def forward(self, emissions: Tensor) -> Scores:
        """Return everything that likelihood and decoding need, in fp32."""
        # New tensors: the parameters themselves are gone after the forward.
        scores = [each.float() * 1.0 for each in (self.transitions, self.starts, self.ends)]
        if self.is_constrained:
            biases = (self.transition_bias, self.start_bias, self.end_bias)
            scores = [each + bias.float() for each, bias in zip(scores, biases, strict=True)]
        transitions, starts, ends = scores
        return emissions.float(), transitions, starts, ends


def to_front(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Move the positions that bear a label to the front of each row.

    Args:
        values: (batch, length, …).
        labels: int64 (batch, length); -100 where there is none.

    Returns:
        The values in their new places, cut to the longest chain; bool (batch, longest): which hold one.
    """
    here = labels != IGNORED
    longest = max(1, int(here.sum(1).max()))
    places = torch.argsort((~here).long(), dim=1, stable=True)
    index = places.reshape(*places.shape, *[1] * (values.dim() - 2)).expand_as(values)
    filled = torch.arange(longest, device=labels.device) < here.sum(1, keepdim=True)
    return values.gather(1, index)[:, :longest], filled


def log_likelihood(scores: Scores, labels: Tensor) -> Tensor:
    """Return the summed log-probability of the labels, in fp32; a row without labels adds 0.

    Args:
        scores: what the CRF's forward returned.
        labels: int64 (batch, length); positions of -100 are no part of the chain.
    """
    emissions, transitions, starts, ends = scores
    emissions, mask = to_front(emissions, labels)
    tags = to_front(labels, labels)[0].clamp_min(0)
    keep = mask.to(emissions.dtype)
    # The score of the labels themselves.
    own = (emissions.gather(2, tags.unsqueeze(-1)).squeeze(-1) * keep).sum(1)
    steps = (transitions[tags[:, :-1], tags[:, 1:]] * keep[:, 1:]).sum(1)
    last = tags.gather(1, (mask.sum(1, keepdim=True) - 1).clamp_min(0)).squeeze(1)
    score = own + steps + (starts[tags[:, 0]] + ends[last]) * keep[:, 0]
    # The forward algorithm: log of the summed scores of all sequences.
    alpha = starts + emissions[:, 0]
    for t in range(1, emissions.shape[1]):
        further = torch.logsumexp(alpha.unsqueeze(2) + transitions, dim=1) + emissions[:, t]
        alpha = torch.where(mask[:, t : t + 1], further, alpha)
    total = torch.logsumexp(alpha + ends, dim=1) * keep[:, 0]
    return (score - total).sum()


@torch.no_grad()
def viterbi(scores: Scores, here: Tensor) -> Tensor:
    """Return the best label of each position in the best sequence of its row.

    Args:
        scores: what the CRF's forward returned.
        here: bool (batch, length): the positions of the chain.

    Returns:
        int64 (batch, length); -100 outside the chain.
    """
    emissions, transitions, starts, ends = scores
    marks = torch.where(here, 0, IGNORED)
    emissions, mask = to_front(emissions, marks)
    alpha, pointers = starts + emissions[:, 0], []
    stay = torch.arange(len(starts), device=starts.device).expand(len(emissions), -1)
    for t in range(1, emissions.shape[1]):
        best, origin = (alpha.unsqueeze(2) + transitions).max(dim=1)
        is_in = mask[:, t : t + 1]
        alpha = torch.where(is_in, best + emissions[:, t], alpha)
        pointers.append(torch.where(is_in, origin, stay))
    tag = (alpha + ends).argmax(1)
    path = [tag]
    for origin in reversed(pointers):
        tag = origin.gather(1, tag.unsqueeze(1)).squeeze(1)
        path.append(tag)
    in_front = torch.stack(path[::-1], dim=1)
    # Back to where they came from: the n-th of the chain stands at the n-th place that is in it.
    number = (here.long().cumsum(1) - 1).clamp_min(0)
    return torch.where(here, in_front.gather(1, number), IGNORED)


def save(module: LinearChainCRF, directory: Path) -> None:
    """Write the parameters into an export, with what is needed to use them."""
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in module.named_parameters()}
    facts = {"labels": json.dumps(module.labels), "constrained": json.dumps(module.is_constrained)}
    if module.is_constrained:
        # Written with the constraints added, so that a plain reader keeps them.
        for name in ("transition", "start", "end"):
            plural = f"{name}s"
            tensors[plural] = tensors[plural] + getattr(module, f"{name}_bias").float().cpu()
    save_file(tensors, str(directory / FILE), metadata={"format": "pt", **facts})
    (directory / "README.md").write_text(READ_ME, encoding="utf-8")


def load(directory: Path) -> LinearChainCRF | None:
    """Read the parameters from an export; None if there are none."""
    if not (directory / FILE).exists():
        return None
    with safe_open(str(directory / FILE), "pt") as file:
        labels = tuple(json.loads(file.metadata()["labels"]))
        module = LinearChainCRF(labels)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(file.get_tensor(name))
    return module


def start(module: LinearChainCRF, before: LinearChainCRF) -> None:
    """Put into a new CRF what another one knows of the labels with the same names."""
    pairs = [(i, before.labels.index(word)) for i, word in enumerate(module.labels) if word in before.labels]
    if not pairs:
        return
    mine, others = (torch.tensor(each) for each in zip(*pairs, strict=True))

    def free(scores: Tensor) -> Tensor:
        # An export holds the constraints added; a new CRF has its own, or none.
        return torch.where(scores < FORBIDDEN / 2, 0.0, scores)

    with torch.no_grad():
        module.transitions[mine.unsqueeze(1), mine] = free(before.transitions[others.unsqueeze(1), others])
        module.starts[mine] = free(before.starts[others])
        module.ends[mine] = free(before.ends[others])


READ_ME = """# A token classifier with a linear-chain CRF

The model loads with plain transformers. The CRF's parameters are in `crf.safetensors`; these lines use both:

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, AutoTokenizer

directory = "."
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForTokenClassification.from_pretrained(directory).eval()
crf = load_file(f"{directory}/crf.safetensors")


def tag(words):
    # Byte-level tokenizers tell the begin of a word by a space.
    space = " " if '"ByteLevel"' in tokenizer.backend_tokenizer.to_str() else ""
    marked = [space + word for word in words]
    inputs = tokenizer(marked, is_split_into_words=True, truncation=True, return_tensors="pt")
    owners = inputs.word_ids(0)
    firsts = [i for i, word in enumerate(owners) if word is not None and word not in owners[:i]]
    with torch.no_grad():
        scores = model(**inputs).logits[0, firsts].float()
    best, origins = crf["starts"] + scores[0], []
    for score in scores[1:]:
        best, origin = (best.unsqueeze(1) + crf["transitions"]).max(0)
        best, origins = best + score, [*origins, origin]
    path = [int((best + crf["ends"]).argmax())]
    for origin in reversed(origins):
        path.append(int(origin[path[-1]]))
    found = {owners[i]: model.config.id2label[k] for i, k in zip(firsts, reversed(path))}
    return [found.get(i, "O") for i in range(len(words))]


print(tag("Angela Merkel was born in Hamburg".split()))
```
"""
