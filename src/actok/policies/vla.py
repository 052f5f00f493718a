"""A vision-language-action model: backbone, prompt, and heads that act through a frozen tokenizer's codes or beside them.

Sources: FASTerVLA (arXiv 2512.04952, section 3.2) for the codes; pi0.5 with knowledge insulation (arXiv 2505.23705) and
X-Tokenizer (arXiv 2606.14752) for codes that supervise the backbone while a flow-matching expert gives the actions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from actok.backbones.decoder import DecoderBackbone, Prefix
from actok.core import ActionTokenizer, ConfigError, DataError, SpaceMismatchError, write_folder
from actok.core.artifact import CONFIG_FILE, TENSOR_FILE, artifact_files
from actok.policies.base import Acted, Policy, PolicyBatch, PolicyObservation
from actok.policies.config import DECODING, VLAConfig
from actok.policies.flow_head import FlowHead
from actok.policies.heads import Head, Seen
from actok.policies.precision import check_precision, computing, round_matrices
from actok.policies.prompt import StateRange, prompts
from actok.policies.token_head import TokenHead, read_on, say, text_losses
from actok.policies.vocab import VocabularyMap

KIND, VERSION = "vla", 1
TOKENIZER, BACKBONE = "tokenizer", "backbone"

__all__ = ["VLA", "VLAConfig", "integrity"]


class VLA(Policy):
    """See the module; `VLA.create` makes one, `load_policy` reads a saved one."""

    def __init__(
        self,
        backbone: DecoderBackbone,
        tokenizer: ActionTokenizer,
        config: VLAConfig,
        vocab: VocabularyMap,
        *,
        embodiment: str,
        horizon: int,
        views: tuple[str, ...],
        state: StateRange | None,
        meta: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.tokenizer, self.config, self.vocab = tokenizer, config, vocab
        self.embodiment, self.horizon, self.views = embodiment, horizon, views
        self.state, self.meta = state, dict(meta)
        self.proprio = 0 if state is None else len(state)
        self.backbone = backbone
        backbone.resize(vocab.embeddings)
        self.state_in: nn.Module | None = None
        if state is not None and config.state == "vector":
            width = backbone.width
            self.state_in = nn.Sequential(nn.Linear(len(state), width), nn.SiLU(), nn.Linear(width, width))
        parts: dict[str, Head] = {}
        for name in config.heads:
            parts[name] = self._head(name)
        self.parts = nn.ModuleDict(parts)

    def _head(self, name: str) -> Head:
        where: dict[str, Any] = {"horizon": self.horizon, "embodiment": self.embodiment}
        c = self.config
        if name == "flow":
            return FlowHead(self.backbone, self.tokenizer, width=c.flow_expert, steps=c.flow_steps, **where)
        return TokenHead(
            self.backbone,
            self.tokenizer,
            self.vocab,
            block=c.block,
            spacing=c.spacing,
            sampling=c.sampling,
            expert_width=c.token_expert,
            **where,
        )

    @classmethod
    def create(
        cls,
        backbone: DecoderBackbone,
        tokenizer: ActionTokenizer,
        config: VLAConfig,
        *,
        embodiment: str | None = None,
        horizon: int | None = None,
        views: tuple[str, ...] = (),
        state: StateRange | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Self:
        """An untrained policy: new heads, and the backbone's table extended by the codes.

        Args:
            embodiment: of the tokenizer; None: its first.
            horizon: T; None: the tokenizer's.
            views: cameras, in the order in which they are shown.
            state: range of the proprioception; left out with `config.state` "none", needed otherwise.

        Raises ConfigError where the policy would be blind or its parts do not fit.
        """
        embodiment = embodiment or next(iter(tokenizer.spaces))
        if embodiment not in tokenizer.spaces:
            raise ConfigError(f"the tokenizer knows {', '.join(tokenizer.spaces)}, not {embodiment!r}; adapt it first")
        horizon = horizon or tokenizer.horizon
        if config.state == "none":
            state = None
        elif state is None:
            raise ConfigError(f"state is {config.state!r} but no range of proprioception was given; set state=none")
        if state is None and not views:
            raise ConfigError("the policy would see nothing: no views and no state; name views, or set state=text")
        if backbone.views is not None and len(views) > backbone.views:
            raise ConfigError(f"{backbone.name} takes {backbone.views} images; {len(views)} views are named")
        special = {k: v for k, v in backbone.special_ids.items() if v is not None}
        rest: dict[str, Any] = {"special": tuple(special.values())}
        if "end" in special:
            rest["existing"] = {"end": special["end"]}
        if config.vocabulary == "tail":
            rest["reserved"] = config.reserved
        if config.id_range is not None:
            rest["start"], rest["stop"] = config.id_range
        model_vocab = backbone.text_size if config.vocabulary == "added" else backbone.vocab_size
        layout = tokenizer.layout_for(horizon, embodiment)
        vocab = VocabularyMap.for_layouts(config.vocabulary, layout, model_vocab, **rest)
        return cls(
            backbone,
            tokenizer,
            config,
            vocab,
            embodiment=embodiment,
            horizon=horizon,
            views=tuple(views),
            state=state,
            meta=meta or {},
        )

    @property
    def heads(self) -> tuple[str, ...]:
        """See Policy.heads."""
        return self.config.heads

    @property
    def decoding(self) -> dict[str, Any]:
        """See Policy.decoding: those of `policies.config.DECODING` that concern its heads."""
        return {name: getattr(self.config, name) for name, head in DECODING.items() if head in self.heads}

    def with_decoding(self, **settings: Any) -> Self:
        """See Policy.with_decoding. `config` says the same from then on, in a saved policy too."""
        super().with_decoding(**settings)
        self.config = replace(self.config, **settings)
        for part in self.parts.values():
            if isinstance(part, TokenHead):
                part.sampling = self.config.sampling
            elif isinstance(part, FlowHead):
                part.steps = self.config.flow_steps
        return self

    def with_precision(self, precision: str) -> Self:
        """See Policy.with_precision. "bf16" is bfloat16 autocast, as in training, with what autocast rounds rounded once.

        So it takes about half the memory, and is for acting alone: nothing brings the rounded digits back. Actions are
        decoded, and flows integrated, in float32. Raises ConfigError for float32 once it is rounded.
        """
        if check_precision(precision) == "float32" != self.precision:
            raise ConfigError(
                "the policy was rounded to bf16 when it was set to act in that; load it again for float32"
            )
        if precision == "bf16":
            round_matrices(self)
        self.precision = precision
        return self

    # -- seeing ---------------------------------------------------------------------------------------------------

    def _checked(self, observation: PolicyObservation) -> PolicyObservation:
        """Raises DataError naming what is missing or of another size."""
        count = len(observation)
        if isinstance(observation.instruction, str) or not count:
            told = repr(observation.instruction) if count else "none"
            raise DataError(f"the instructions are {told}; give a list, one text an observation, at least one")
        if self.state is not None:
            given = observation.proprio
            if given is None or np.shape(given) != (count, self.proprio):
                found = "nothing" if given is None else f"shape {np.shape(given)}"
                raise DataError(
                    f"the policy reads a state of {self.proprio} numbers, [{count}, {self.proprio}]; it was given {found}"
                )
            if not np.isfinite(given).all():
                b, p = (int(i) for i in np.argwhere(~np.isfinite(given))[0])
                raise DataError(f"the state of observation {b} holds {given[b, p]} at {p}; look at the sensor")
        for view in self.views:
            if view not in observation.images:
                there = ", ".join(observation.images) or "none"
                raise DataError(f"the policy looks through {', '.join(self.views)}; the images given are: {there}")
        return observation

    def _look(self, observation: PolicyObservation) -> Prefix:
        self._checked(observation)
        text_state = self.state if self.config.state == "text" else None
        texts = prompts(observation.instruction, observation.proprio, text_state, self.config.state_bins)
        prefix = self.backbone.prefix(texts, [observation.images[view] for view in self.views])
        return prefix if self.state_in is None else self._with_state(prefix, observation)

    def _with_state(self, prefix: Prefix, observation: PolicyObservation) -> Prefix:
        """One more position behind the prompt: the state as a vector."""
        assert self.state is not None
        assert self.state_in is not None
        assert observation.proprio is not None
        device = prefix.embeds.device
        unit = torch.from_numpy(self.state.unit(observation.proprio)).to(device)
        there = prefix.real.new_ones(len(unit), 1)
        where = prefix.next_position[:, None].expand(*prefix.positions.shape[:-1], 1)
        return replace(
            prefix,
            embeds=torch.cat([prefix.embeds, self.state_in(unit)[:, None].to(prefix.embeds.dtype)], 1),
            real=torch.cat([prefix.real, there], 1),
            positions=torch.cat([prefix.positions, where], -1),
            next_position=prefix.next_position + 1,
        )

    def _see(self, prefix: Prefix, observation: PolicyObservation) -> Seen:
        hidden, cache = self.backbone.run_prefix(prefix)
        rows = torch.arange(len(hidden), device=hidden.device)
        return Seen(
            backbone=self.backbone,
            cache=cache,
            real=prefix.real,
            last=hidden[rows, prefix.last()],
            next_position=prefix.next_position,
            anchor=None if self.state is None else observation.proprio,  # as the codes of the training were made
        )

    # -- training -------------------------------------------------------------------------------------------------

    def losses(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """Weighted: "tokens" and "flow" by head; "text" where the policy speaks (the words, and <BoBlk> after them),
        "text_after" where it concludes (the words behind codes and <EoBlk>, and the end).
        """
        seen = self._see(self._look(batch.observation), batch.observation)
        found: dict[str, Tensor] = {}
        if self.config.speaks:
            found["text"], seen = text_losses(seen, batch.text, self.vocab.boblk)
        for name, head in self.parts.items():
            assert isinstance(head, Head)
            weight = self.config.flow_weight if name == "flow" else self.config.token_weight
            read = seen.detach() if name == "flow" and self.config.insulate else seen
            found |= {key: weight * value for key, value in head.losses(read, batch).items()}
        if self.config.concludes:
            codes = self._codes_in_text(batch.codes.cpu().numpy())
            found["text_after"], _ = text_losses(seen, batch.after, self.vocab.end, before=codes)
        return found

    def terms(self, batch: PolicyBatch) -> dict[str, int]:
        """See Policy.terms: codes, real steps, and tokens of texts with the one that ends each."""
        found = {"tokens": int((batch.codes >= 0).sum()), "flow": int(batch.real.sum())}
        for name, texts in (("text", batch.text), ("text_after", batch.after)):
            said = [] if texts is None else self.backbone.text_ids(texts)
            found[name] = len(batch) + sum(map(len, said))
        return found

    def _codes_in_text(self, codes: np.ndarray) -> list[list[int]]:
        """Codes [B, n] (-1 behind the end) as the backbone reads them within a text: its ids, and <EoBlk>.

        They stand behind the prompt as any token does, one after the other and each seeing those before, whoever emitted
        them in whatever blocks. Deviation: FASTer (section 3.2) switches between text and blocks within one sequence, so
        that its words would see the blocks as they were emitted, and not read them once more.
        """
        layout = self.tokenizer.layout_for(self.horizon, self.embodiment)
        return [[*self.vocab.to_lm(row[row >= 0], layout).tolist(), self.vocab.eoblk] for row in codes]

    def report(self) -> dict[str, float]:
        """What the heads noted in the last `losses` outside training: accuracy of the codes, by level too."""
        return {
            key: float(value)
            for head in self.parts.values()
            if isinstance(head, TokenHead)
            for key, value in head.accuracy.items()
        }

    # -- acting ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def act(
        self,
        observation: PolicyObservation,
        *,
        head: str | None = None,
        generator: torch.Generator | None = None,
        deadline_s: float | None = None,
    ) -> Acted:
        """See Policy.act. The head that is not asked for does not run.

        Words after the codes are said before this returns, so with a deadline, and by a head without codes, none are.
        """
        with computing(self.precision, next(self.parameters()).device):
            return self._act(observation, head, generator, deadline_s)

    def _act(
        self,
        observation: PolicyObservation,
        head: str | None,
        generator: torch.Generator | None,
        deadline_s: float | None,
    ) -> Acted:
        name = head or self.heads[0]
        if name not in self.parts:
            raise ConfigError(f"the policy has no head {name!r}; it has {', '.join(self.heads)}")
        begin = time.perf_counter()
        deadline = None if deadline_s is None else begin + deadline_s
        was = self.training
        self.eval()
        try:
            prefix = self._look(observation)
            looked = time.perf_counter()
            seen = self._see(prefix, observation)
            texts = [""] * len(observation)
            if self.config.speaks:
                texts, seen = say(seen, self.vocab, self.vocab.boblk)
            read = time.perf_counter()
            part = self.parts[name]
            assert isinstance(part, Head)
            found = part.act(seen, generator=generator, deadline=deadline)
            acted = time.perf_counter()
            after, seconds = [""] * len(observation), dict(found.seconds)
            if self.config.concludes and found.codes is not None and deadline is None:
                after, _ = say(read_on(seen, self._codes_in_text(found.codes)), self.vocab, self.vocab.end)
                seconds["text_after"] = time.perf_counter() - acted
        finally:
            self.train(was)
        return Acted(
            actions=found.actions,
            valid=found.valid,
            reasons=found.reasons,
            passes=found.passes,
            codes=found.codes,
            text=texts,
            text_after=after,
            seconds={"images": looked - begin, "prefix": read - looked, **seconds},
            clipped=found.clipped,
            state_beyond=None if self.state is None else self.state.beyond(np.asarray(observation.proprio)),
        )

    # -- keeping it -----------------------------------------------------------------------------------------------

    def with_meta(self, meta: Mapping[str, Any]) -> Self:
        """The same policy with these facts added."""
        self.meta = {**self.meta, **meta}
        return self

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the policy, all or nothing: config.json, model.safetensors, tokenizer/, backbone/.

        Raises ArtifactError where the folder holds something else.
        """
        from safetensors.torch import save

        from actok import __version__

        artifact = self.tokenizer.to_artifact()
        files = {f"{TOKENIZER}/{name}": content for name, content in artifact_files(artifact).items()}
        files |= {f"{BACKBONE}/{name}": content for name, content in self.backbone.files().items()}
        files[TENSOR_FILE] = save(_apart(self.state_dict()))
        body = {
            "schema_version": VERSION,
            "policy": KIND,
            "tokenizer": artifact.weights_hash,
            "backbone": dict(self.backbone.spec()),
            "config": asdict(self.config),
            "vocabulary": self.vocab.to_dict(),
            "embodiment": self.embodiment,
            "space": self.space.to_dict(),
            "horizon": self.horizon,
            "views": list(self.views),
            "state": None if self.state is None else self.state.to_dict(),
            "files": {name: sha256(content).hexdigest() for name, content in sorted(files.items())},
            "meta": {"actok_version": __version__, **self.meta},
        }
        body["integrity"] = integrity(body)
        files[CONFIG_FILE] = (json.dumps(body, indent=2) + "\n").encode()
        return write_folder(Path(folder), files)

    def check(self, space: Any, *, rate_hz: float | None = None) -> None:
        """Raise SpaceMismatchError where actions of that space (at that rate) are not this policy's."""
        if found := self.space.differences(space):
            raise SpaceMismatchError(
                f"the policy acts in {self.embodiment!r}, which is not {space.embodiment!r}: {'; '.join(found)}"
            )
        if rate_hz is not None and self.space.rate_hz is not None and rate_hz != self.space.rate_hz:
            raise SpaceMismatchError(
                f"the policy acts at {self.space.rate_hz:g} Hz, not at {rate_hz:g}; give data of its rate"
            )


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, none sharing memory with another (tables that are also output layers do): only those are copied."""
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, value in state.items():
        there = value.detach().cpu().contiguous()
        place = there.untyped_storage().data_ptr()
        found[name] = there.clone() if place in known else there
        known.add(place)
    return found


def integrity(body: Mapping[str, Any]) -> str:
    """Hash of what a config.json says, however it is laid out."""
    return sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
