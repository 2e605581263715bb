"""The activation planner: what each layer keeps for its backward pass and where, under a memory budget.

Every tensor of a layer may stay on the card, go to pinned host memory and come back, or be computed anew. The planner knows each one's
bytes and the time that its recomputation costs, keeps on the card what costs most time a byte, sends to the host what the bus can carry
while the card computes, and leaves the rest to recomputation. It also chooses how many tokens go through a forward pass at once, the tiles
of MLP and head, and which NF4 weights are worth keeping dequantized. All of it is arithmetic on the shape: nothing is loaded
or measured, so the same numbers estimate a job before it starts. The result is exact whatever the plan.

Times are seconds, sizes bytes. T tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from finery_common.errors import ResourceExhaustedError
from finery_trainer.engine.packing import SMALL_TOKENS, padded_tokens

if TYPE_CHECKING:
    from finery_trainer.engine.architecture import LayerShape, ModelShape

NEVER = 1 << 62
_OFFLOADABLE = ("x", "o", "qkv", "x2", "h1", "h2", "gate_up", "act")
_MIN_TILE = 1024
_MIN_GROUPED_TOKENS = 32768
_MAX_ROUNDS = 12
_GRAPHED = 2
"""How many passes' memory there is with CUDA graphs: theirs, and that of passes which are not captured."""
_SMALL_BYTES = 32 << 20  # batches, cuBLAS's own workspace


@dataclass(frozen=True, kw_only=True)
class AttentionRates:
    """FLOP a second of causal attention on very long rows, and the row length at which half of that is reached."""

    forward_flop: float
    forward_half_tokens: float
    backward_flop: float
    backward_half_tokens: float

    def seconds(self, forward_flop: float, row_tokens: float) -> tuple[float, float]:
        """(forward, backward) for so many FLOP of the forward pass in rows of so many tokens. Backward has 2.5 times the FLOP."""
        forward_s = forward_flop / self.forward_flop * (1 + self.forward_half_tokens / row_tokens)
        backward_s = 2.5 * forward_flop / self.backward_flop * (1 + self.backward_half_tokens / row_tokens)
        return forward_s, backward_s


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does in a second; measured on an H200 with bf16 and the engine's own shapes."""

    gemm_flop: float = 670e12
    dense_attention: AttentionRates = AttentionRates(
        forward_flop=620e12, forward_half_tokens=600, backward_flop=560e12, backward_half_tokens=1400
    )
    """cuDNN's, which rows of one length take: within 3 % of what was measured from 2,048 to 32,768 tokens."""
    packed_attention: AttentionRates = AttentionRates(
        forward_flop=355e12, forward_half_tokens=800, backward_flop=325e12, backward_half_tokens=1500
    )
    """Flash's, which packs of unlike rows take."""
    memory_bytes: float = 3.6e12
    host_bytes: float = 44e9
    """Over the bus in one direction while the card computes."""
    launch_s: float = 2e-3
    """Launching a layer's forward and backward pass, on a slow host. A card that is busy for longer waits for a tenth of it."""
    overhead: float = 1.05
    """Of computing time, for what is not counted below: the adapters' products and copies, the optimizer."""
    full_tokens: int = 256
    """Tokens at which products reach half their rate."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """LoRA ranks of a layer's projections, all members together; 0 without adapter."""

    qkv: int = 0
    o: int = 0
    gate_up: int = 0
    down: int = 0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One optimizer step: how many tokens, in rows of which length, and what the model's weights are."""

    num_tokens: int
    longest_row: int
    mean_row: float
    ranks: Ranks
    element_bytes: int = 2
    is_quantized: bool = False
    trains_weights: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is kept between forward and backward pass, a set of `block.RECOMPUTABLE` for each layer, and how rows are tiled."""

    card: tuple[frozenset[str], ...]
    """On the device."""
    host: tuple[frozenset[str], ...]
    """In pinned host memory; `x` too may be there."""
    mlp_rows: int = NEVER
    """Rows that go through an MLP at a time."""
    head_rows: int = 1024
    """Rows of logits at a time."""
    head_groups: int = 1
    """Into how many groups attention's heads are divided, one computed after the other."""
    pack_tokens: int = NEVER
    """Tokens that go through a forward pass at a time."""
    resident: frozenset[tuple[int, str]] = frozenset()
    """(layer, projection) of NF4 weights that a dequantized copy is kept of."""
    activation_bytes: int = 0
    """Kept on the card at the end of a forward pass."""
    workspace_bytes: int = 0
    """What passes through beside them, at its peak."""
    resident_bytes: int = 0
    """Dequantized copies."""
    host_bytes: int = 0
    """Pinned."""
    is_graphed: bool = False
    """Whether passes are captured in CUDA graphs, which keep a pass's memory beside that of passes that are not captured."""
    step_s: float = 0.0
    """Estimated time of an optimizer step."""

    @property
    def card_bytes(self) -> int:
        """Everything besides weights, gradients and optimizer states."""
        num_held = _GRAPHED if self.is_graphed else 1
        return num_held * (self.activation_bytes + self.workspace_bytes) + self.resident_bytes


def keep_all(num_layers: int) -> Plan:
    """Nothing is recomputed."""
    everything = frozenset(_OFFLOADABLE) - {"x"}
    return Plan(card=(everything,) * num_layers, host=(frozenset(),) * num_layers)


def plan_step(
    shape: ModelShape,
    work: Workload,
    *,
    card_bytes: int,
    host_bytes: int = 0,
    rates: Rates | None = None,
    pack_tokens: int | None = None,
    is_capturable: bool = False,
) -> Plan:
    """The fastest plan for `work` whose activations and workspace take at most `card_bytes`, and at most `host_bytes` of pinned memory.

    `pack_tokens` fixes the tokens of a forward pass; `is_capturable` says that small ones may be captured in CUDA graphs. Raises
    ResourceExhaustedError where even recomputing everything does not fit: the message says how many bytes would.
    """
    rates = Rates() if rates is None else rates
    plans: list[Plan] = []
    for tokens in _pack_sizes(work, pack_tokens):
        plans.append(_Planner(shape, work, rates, tokens).best(card_bytes, host_bytes))
        if is_capturable and padded_tokens(tokens) <= SMALL_TOKENS:
            # A graph can not wait for what comes from the host.
            plans.append(_Planner(shape, work, rates, tokens, is_graphed=True).best(card_bytes, host_bytes=0))
    fitting = [plan for plan in plans if plan.card_bytes <= card_bytes]
    if not fitting:
        least = min(plan.card_bytes for plan in plans)
        raise ResourceExhaustedError(
            f"memory: got {card_bytes / 2**30:.2f} GiB for activations, wanted at least {least / 2**30:.2f} GiB for rows of "
            f"{work.longest_row} tokens; shorten the rows, raise memory.budget, or allow more pinned host memory.",
            code="out_of_memory",
            param="spec.memory.budget",
        )
    return min(fitting, key=lambda plan: plan.step_s)


def _pack_sizes(work: Workload, fixed: int | None) -> Iterator[int]:
    if fixed is not None:
        yield max(fixed, work.longest_row)
        return
    size = work.num_tokens
    while size > work.longest_row:
        yield size
        size = -(-size // 2)
    yield work.longest_row


@dataclass(frozen=True)
class _Tiles:
    mlp_rows: int
    head_rows: int
    head_groups: int


class _Planner:
    """Plans for packs of `tokens` tokens, with what they are padded to."""

    def __init__(self, shape: ModelShape, work: Workload, rates: Rates, tokens: int, *, is_graphed: bool = False) -> None:
        self._pack_tokens, self._is_graphed = tokens, is_graphed
        self._num_packs = -(-work.num_tokens // tokens)
        tokens = padded_tokens(tokens)
        self._shape, self._work, self._rates, self._tokens = shape, work, rates, tokens
        self._layers = [_LayerCost(layer, work, rates, tokens) for layer in shape.layers]
        self._spare = max(work.ranks.o, work.ranks.down)

    def best(self, card_bytes: int, host_bytes: int) -> Plan:
        """The fastest over the tile sizes; where nothing fits, the one that takes least."""
        plans = [
            self._with_tiles(card_bytes, host_bytes, tiles=_Tiles(mlp_rows, head_rows, head_groups))
            for mlp_rows in self._tiles()
            for head_rows in (1024, 256)
            for head_groups in self._head_groups()
        ]
        fitting = [plan for plan in plans if plan.card_bytes <= card_bytes]
        return min(fitting, key=lambda plan: plan.step_s) if fitting else min(plans, key=lambda plan: plan.card_bytes)

    def _tiles(self) -> Iterator[int]:
        rows = self._tokens
        while True:
            yield rows
            if rows <= 2 * _MIN_TILE:
                return
            rows = -(-rows // 2)

    def _head_groups(self) -> tuple[int, ...]:
        """Groups that are large enough for a card each."""
        return (1, self._shape.layers[0].num_kv_heads) if self._tokens >= _MIN_GROUPED_TOKENS else (1,)

    def _with_tiles(self, card_bytes: int, host_bytes: int, *, tiles: _Tiles) -> Plan:
        """The plan for given tiles: placed into what a first guess of the workspace leaves, then into what the true peak leaves."""
        room = card_bytes
        plan = self._placed(room, host_bytes, tiles=tiles)
        for _ in range(_MAX_ROUNDS):
            excess = plan.card_bytes - card_bytes
            if excess <= 0 or room <= 0:
                break
            room -= excess + (excess >> 3)
            plan = self._placed(room, host_bytes, tiles=tiles)
        return plan

    def _placed(self, room: int, host_bytes: int, *, tiles: _Tiles) -> Plan:
        is_tiled = tiles.mlp_rows < self._tokens
        held = _GRAPHED if self._is_graphed else 1
        placed = _Placement(len(self._layers), room // held - sum(layer.fixed_bytes for layer in self._layers), host_bytes)
        self._place_streams(placed)
        self._place_rest(placed, is_tiled=is_tiled)
        peak = self._peak(placed, tiles)
        kept = placed.card_bytes + sum(layer.fixed_bytes for layer in self._layers)
        resident, resident_bytes = self._place_weights(room - held * peak)
        return Plan(
            card=tuple(frozenset(names) for names in placed.card),
            host=tuple(frozenset(names) for names in placed.host),
            mlp_rows=tiles.mlp_rows if is_tiled else NEVER,
            head_rows=tiles.head_rows,
            head_groups=tiles.head_groups,
            pack_tokens=self._pack_tokens,
            resident=resident,
            activation_bytes=kept,
            workspace_bytes=peak - kept,
            resident_bytes=resident_bytes,
            host_bytes=placed.host_bytes,
            is_graphed=self._is_graphed,
            step_s=self._step_s(placed, len(resident), tiles),
        )

    def _step_s(self, placed: _Placement, num_resident: int, tiles: _Tiles) -> float:
        """What the bus cannot carry in time is waited for, and so are launches; small tiles are slower by a little."""
        computed_s = sum(layer.forward_s + layer.backward_s + sum(layer.saved_s.values()) for layer in self._layers) - placed.saved_s
        waited_s = 2 * max(0.0, placed.host_bytes / self._rates.host_bytes - sum(layer.forward_s for layer in self._layers))
        dequantized_s = self._dequantization_s() * (1 - num_resident / (4 * len(self._layers)))
        launched_s = 0.0 if self._is_graphed else self._rates.launch_s * len(self._layers)
        pass_s = max(self._rates.overhead * (computed_s + waited_s), launched_s) + launched_s / 10
        step_s = self._num_packs * pass_s + self._head_s()
        slower = 0.01 * max(0, (4096 // tiles.mlp_rows).bit_length() - 1) + (0.002 if tiles.head_rows < 1024 else 0.0)
        slower += 0.01 if tiles.head_groups > 1 else 0.0
        return step_s * (1 + slower) + dequantized_s

    def _peak(self, placed: _Placement, tiles: _Tiles) -> int:
        """The most bytes at a time, over all layers, forward and backward, and the head."""
        kept = [
            layer.fixed_bytes + sum(layer.bytes[name] for name in placed.card[i] | (set() if "x" in placed.host[i] else {"x"}))
            for i, layer in enumerate(self._layers)
        ]
        hosted = [sum(layer.bytes[name] for name in placed.host[i]) for i, layer in enumerate(self._layers)]
        peak, below, mlp_rows = 0, 0, min(tiles.mlp_rows, self._tokens)
        for i, layer in enumerate(self._layers):
            stored = kept[i] + hosted[i]
            before = hosted[i - 1] if i else 0
            names = placed.card[i] | placed.host[i]
            forward = below + before + stored + layer.forward_transient(names, mlp_rows, tiles.head_groups)
            backward = below + stored + before + layer.backward_transient(names, mlp_rows, tiles.head_groups)
            peak = max(peak, forward, backward)
            below += kept[i]
        element = self._work.element_bytes
        head_row = self._shape.vocab_size * 4 + 2 * self._shape.hidden * element
        head = below + 3 * self._layers[0].bytes["x"] + min(tiles.head_rows, self._tokens) * head_row + self._tokens * element * self._spare
        weights = sum(self._layers[0].weight_bytes.values()) if self._work.is_quantized else 0
        return max(peak, head, self._embedding_bytes()) + weights + self._rotary_bytes() + _SMALL_BYTES

    def _embedding_bytes(self) -> int:
        """The gradient of a trained embedding, when all layers are done: the stream's, its sums by token in float32, the whole matrix."""
        if not self._work.trains_weights:
            return 0
        hidden, element = self._shape.hidden, self._work.element_bytes
        return hidden * (self._tokens * (element + 4) + self._shape.vocab_size * element)

    def _rotary_bytes(self) -> int:
        """cos and sin in float32, for the longest row."""
        tables = {layer.rope for layer in self._shape.layers} - {None}
        return len(tables) * 2 * self._work.longest_row * self._shape.layers[0].head_dim * 4

    def _place_streams(self, placed: _Placement) -> None:
        """The layers' inputs: on the card while there is room for all of them, else on the host, the first layers first."""
        x_bytes = self._layers[0].bytes["x"]
        room = max(0, placed.card_room // x_bytes) if x_bytes else len(self._layers)
        num_host = max(0, len(self._layers) - room)
        # Inputs compete with what costs more to compute; on the host they cost nothing while the bus keeps up.
        free = self._free_host_bytes()
        num_host = max(num_host, min(len(self._layers) - 2, int(min(free, placed.host_room) // x_bytes)) if self._is_tight(placed) else 0)
        for index in range(len(self._layers)):
            if index < num_host and placed.host_room >= x_bytes:
                placed.to_host(index, "x", x_bytes)
            else:
                placed.to_card(index, "x", x_bytes)

    def _is_tight(self, placed: _Placement) -> bool:
        return placed.card_room < sum(sum(layer.bytes.values()) for layer in self._layers)

    def _free_host_bytes(self) -> float:
        """What the bus carries during one forward pass."""
        return sum(layer.forward_s for layer in self._layers) * self._rates.host_bytes

    def _place_rest(self, placed: _Placement, *, is_tiled: bool) -> None:
        """By time saved a byte, to the card from the last layer, then to the host from the first, as far as the bus carries it in time."""
        wanted = [
            (layer.saved_s[name] / layer.bytes[name], name, index)
            for index, layer in enumerate(self._layers)
            for name in layer.saved_s
            if not (is_tiled and name in ("gate_up", "act"))
        ]
        free = self._free_host_bytes()
        for _, name, index in sorted(wanted, key=lambda item: (-item[0], -item[2])):
            layer = self._layers[index]
            if placed.card_room >= layer.bytes[name]:
                placed.to_card(index, name, layer.bytes[name], saved_s=layer.saved_s[name])
        for _, name, index in sorted(wanted, key=lambda item: (-item[0], item[2])):
            layer = self._layers[index]
            size = layer.bytes[name]
            is_worth_it = layer.saved_s[name] > 2 * size / self._rates.host_bytes or placed.host_bytes + size <= free
            if name not in placed.card[index] and index < len(self._layers) - 2 and is_worth_it and placed.host_room >= size:
                placed.to_host(index, name, size, saved_s=layer.saved_s[name])

    def _place_weights(self, room: int) -> tuple[frozenset[tuple[int, str]], int]:
        """NF4 weights that a dequantized copy fits of."""
        resident: set[tuple[int, str]] = set()
        used = 0
        for index, layer in enumerate(self._layers if self._work.is_quantized else []):
            for name, size in layer.weight_bytes.items():
                if room - used >= size:
                    resident.add((index, name))
                    used += size
        return frozenset(resident), used

    def _dequantization_s(self) -> float:
        if not self._work.is_quantized:
            return 0.0
        read_and_written = sum(sum(layer.weight_bytes.values()) for layer in self._layers) * 1.25
        return 2 * self._num_packs * read_and_written / self._rates.memory_bytes

    def _head_s(self) -> float:
        flop = 2 * self._shape.vocab_size * self._shape.hidden * self._work.num_tokens * (3 if self._work.trains_weights else 2)
        return flop / self._rates.gemm_flop


class _LayerCost:
    """Bytes and times of one layer at one pack size."""

    def __init__(self, layer: LayerShape, work: Workload, rates: Rates, tokens: int) -> None:
        element, ranks = work.element_bytes, work.ranks
        widths = {
            "x": layer.hidden,
            "h1": layer.hidden + ranks.qkv,
            "qkv": layer.num_qkv + ranks.qkv,
            "o": layer.num_attention + layer.num_heads * 4 // element,
            "x2": layer.hidden,
            "h2": layer.hidden + ranks.gate_up,
            "gate_up": 2 * layer.intermediate + ranks.gate_up,
            "act": layer.intermediate + ranks.down,
        }
        self.bytes: Mapping[str, int] = {name: tokens * width * element for name, width in widths.items()}
        self._tokens, self._layer, self._element = tokens, layer, element
        norms = layer.num_heads + layer.num_kv_heads if layer.has_qk_norm else 0
        self._statistics_bytes = tokens * 4 * (layer.num_heads + norms)
        """Logsumexp and the heads' norms, made again beside those that are kept."""
        self.fixed_bytes = tokens * (8 + 4 * norms + ranks.o * element + (2 * layer.hidden * element + 8 if layer.has_post_norms else 0))
        gemms = {
            "qkv": layer.hidden * layer.num_qkv,
            "o": layer.num_attention * layer.hidden,
            "gate_up": 2 * layer.hidden * layer.intermediate,
            "down": layer.hidden * layer.intermediate,
        }
        outputs = {"qkv": layer.num_qkv, "o": layer.hidden, "gate_up": 2 * layer.intermediate, "down": layer.hidden}
        added = {"qkv": ranks.qkv, "o": ranks.o, "gate_up": ranks.gate_up, "down": ranks.down}
        self.weight_bytes = {
            name: (size // outputs[name] + added[name]) * (outputs[name] + added[name]) * element for name, size in gemms.items()
        }
        seen = min(work.mean_row / 2, layer.window or NEVER)
        attention_rates = rates.dense_attention if work.mean_row >= work.longest_row else rates.packed_attention
        attention_s, attention_backward_s = attention_rates.seconds(tokens * 4 * layer.num_attention * seen, work.mean_row)

        def gemm_s(name: str) -> float:
            return 2 * (tokens + rates.full_tokens) * gemms[name] / rates.gemm_flop

        def traffic_s(*names: str) -> float:
            return sum(self.bytes[name] for name in names) / rates.memory_bytes

        self.saved_s: Mapping[str, float] = {
            "o": attention_s + traffic_s("qkv", "o"),
            "qkv": gemm_s("qkv") + traffic_s("qkv", "qkv"),
            "x2": gemm_s("o") + traffic_s("x", "x"),
            "gate_up": gemm_s("gate_up"),
            "h1": traffic_s("x", "h1", "h1"),
            "h2": traffic_s("x2", "h2", "h2"),
            "act": traffic_s("act", "act"),
        }
        products_s = sum(gemm_s(name) for name in gemms)
        elementwise_s = traffic_s("x", "x", "h1", "h2", "qkv", "gate_up", "act")
        self.forward_s = products_s + attention_s + elementwise_s
        self.backward_s = products_s * (2 if work.trains_weights else 1) + attention_backward_s + 1.5 * elementwise_s

    def forward_transient(self, names: set[str], mlp_rows: int, head_groups: int) -> int:
        """Bytes beside what `names` keeps, at the forward pass's peak."""
        stream, missing = self.bytes["x"], partial(self._missing, names)
        if mlp_rows == self._tokens:
            mlp = missing("x2", "h2") + max(missing("gate_up", "act"), missing("act") + stream)
        else:
            mlp = missing("x2", "h2") + stream + (self.bytes["gate_up"] + self.bytes["act"]) * mlp_rows // self._tokens
        attention = max(
            stream + missing("h1"),
            missing("h1", "qkv"),
            missing("qkv", "o") + self._copies(1) + (self.bytes["o"] // head_groups + self._statistics_bytes if head_groups > 1 else 0),
            missing("o") + stream,
        )
        return max(mlp, attention)

    def backward_transient(self, names: set[str], mlp_rows: int, head_groups: int) -> int:
        """Bytes beside what `names` keeps, at the backward pass's peak; the stream's gradient is among them."""
        stream, missing, is_long = self.bytes["x"], partial(self._missing, names), head_groups > 1
        # Attention's own: the gradients of q, k and v, of k and v by query head, and of q in float32.
        heads = self._tokens * self._layer.num_attention
        own = self._tokens * self._layer.num_qkv * self._element + heads * (2 * self._element + 4)
        restoring = restored = 0
        if "o" not in names:
            # Group by group, q, k and v are let go of again, and what they come from before them.
            restoring = missing("qkv", "o") + self.bytes["o"] // head_groups if is_long else missing("h1", "qkv", "o")
            restoring = stream + self._copies(1) + max(restoring, missing("h1", "qkv")) + self._statistics_bytes
            restored = missing("o") if is_long else missing("h1", "qkv", "o")
        inner = (self.bytes["act"] + missing("gate_up")) * mlp_rows // self._tokens
        mlp = restored + missing("x2", "h2") + 2 * stream + inner
        if is_long:
            # With copies of what belongs to a group; h1 comes again after attention.
            copies = 2 * self.bytes["o"]
            attention = missing("qkv", "o") + (own + copies) // head_groups + self._copies(2) + self._statistics_bytes
            attention = max(attention, missing("h1", "qkv", "o"))
        else:
            attention = missing("h1", "qkv", "o") + own + self._copies(2)
        # What was kept for the MLP and the post-norms is gone by then.
        spent = sum(self.bytes[name] for name in ("x2", "h2", "gate_up", "act") if name in names)
        spent += 2 * stream if self._layer.has_post_norms else 0
        return max(restoring, mlp, attention + 2 * stream - spent)

    def _copies(self, number: int) -> int:
        """Of q, k and v, which a norm of the heads needs as they were, as they are and as gradients."""
        return number * self.bytes["qkv"] if self._layer.has_qk_norm else 0

    def _missing(self, names: set[str], *wanted: str) -> int:
        return sum(self.bytes[name] for name in wanted if name not in names)


class _Placement:
    """What is placed where, while a plan is made."""

    def __init__(self, num_layers: int, card_room: int, host_room: int) -> None:
        self.card: list[set[str]] = [set() for _ in range(num_layers)]
        self.host: list[set[str]] = [set() for _ in range(num_layers)]
        self.card_room, self.host_room = card_room, host_room
        self.card_bytes, self.host_bytes, self.saved_s = 0, 0, 0.0

    def to_card(self, index: int, name: str, size: int, *, saved_s: float = 0.0) -> None:
        if name != "x":
            self.card[index].add(name)
        self.card_room -= size
        self.card_bytes += size
        self.saved_s += saved_s

    def to_host(self, index: int, name: str, size: int, *, saved_s: float = 0.0) -> None:
        self.host[index].add(name)
        self.host_room -= size
        self.host_bytes += size
        self.saved_s += saved_s
