"""The texts that conversions are judged by, as token ids: a fixed set of short passages, and rows of a prepared dataset.

Owns the passages (several languages, code, conversations as plain text), their tokenization by the model's own tokenizer, and reading
a few rows out of dataset shards. A set is the same for the same tokenizer and limits, so that numbers of two conversions compare. Leaves
what is made of them to `parity` and to whoever weighs a quantization.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch

from finery_common.errors import InvalidArgumentError
from finery_converter.tensorfiles import StoredTensor, read_header

GATE_TOKENS = 384
"""Of the passages' beginnings together: enough for a gate, which looks at every logit of every position."""
ROW_TOKENS = 256
_SEED = 20_260_701
_ARBITRARY_TOKENS = 24
_NUM_ARBITRARY = 16

_TEXT = """\
A lighthouse keeper climbs the stairs twice each evening: once to light the lamp, and once more at midnight to see that it still burns.
From the gallery the whole bay lies open, and on clear nights the lights of the fishing boats look like a second sky.
====
Water boils at 100 degrees Celsius at sea level, but on a mountain three kilometres high it boils at about 90 degrees, because the
pressure of the air is lower there. That is why rice takes longer to cook in the mountains.
====
The committee met on Tuesday to discuss the budget for the coming year. After two hours it agreed to repair the bridge first, to put off
the new library until spring, and to ask the schools for a list of what they need most.
====
To bake a simple bread, mix 500 grams of flour with 10 grams of salt, 7 grams of dry yeast and 320 millilitres of warm water. Knead it
for ten minutes, let it rise for an hour, shape it, let it rise again, and bake it at 230 degrees for half an hour.
====
A contract is formed when one party makes an offer and the other accepts it. Unless the law asks for writing, a spoken agreement binds
as well, though it is harder to prove what was said.
====
Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. It happens in the chloroplasts of plant cells, whose green
pigment, chlorophyll, absorbs mostly red and blue light.
====
Im Herbst ziehen die Kraniche nach Süden. Sie fliegen in langen Ketten, rufen einander zu und rasten nachts in flachen Gewässern, wo sie
vor Füchsen sicher sind. Im März kehren die ersten von ihnen zurück.
====
Le marché ouvre à sept heures. Les maraîchers y vendent des poireaux, des carottes et des pommes de la région, et vers midi, quand les
clients se font rares, ils baissent leurs prix pour ne rien remporter chez eux.
====
El tren sale de la estación central a las nueve y media y llega a la costa poco antes del mediodía. Durante el viaje se ven campos de
trigo, algunos molinos y, al final, la línea azul del mar.
====
La biblioteca del paese conserva lettere antiche e mappe disegnate a mano. Chi vuole consultarle deve prenotare un posto, lavarsi le
mani e usare soltanto la matita.
====
A chuva começou de madrugada e não parou até a tarde. As ruas ficaram vazias, o rio subiu quase um metro, e as crianças passaram o dia a
contar os barcos amarrados ao cais.
====
Zimą jezioro zamarza i można po nim chodzić, ale lód przy brzegu bywa cienki. Rybacy wiercą otwory, siadają na małych stołkach i czekają
w ciszy przez wiele godzin.
====
Утром на площади пахнет свежим хлебом. Пекарь открывает ставни, здоровается с соседями и выносит первые корзины, пока город ещё только
просыпается.
====
Kışın köyün yolu karla kapanır. İnsanlar odunlarını sonbaharda keser, peynirlerini mahzene koyar ve akşamları sobanın başında eski
hikâyeler anlatır.
====
春天，山里的雪慢慢融化，溪水流进村庄旁边的稻田。农民们早早起床，修好水渠，准备播种。孩子们放学以后也来帮忙。
====
駅の前に小さな喫茶店があります。朝は新聞を読む人が多く、午後になると学生たちが宿題を広げます。店の主人は客の名前をよく覚えています。
====
가을이 되면 산은 붉은색과 노란색으로 물든다. 사람들은 주말마다 도시락을 싸서 산에 오르고, 정상에서 따뜻한 차를 마신다.
====
في الصباح يفتح الصياد نافذته وينظر إلى البحر. إذا كانت الريح هادئة يجهز قاربه وشباكه، وإذا كانت قوية يبقى في الميناء ويصلح ما تمزق منها.
====
नदी के किनारे एक पुराना पेड़ है। गर्मियों में गाँव के लोग उसकी छाया में बैठते हैं और बच्चे उसकी डालियों से पानी में कूदते हैं।
====
def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


assert median([3, 1, 2]) == 2
====
#include <stdio.h>

int main(void) {
    for (int i = 1; i <= 10; i++) {
        printf("%d squared is %d\\n", i, i * i);
    }
    return 0;
}
====
SELECT customer.name, COUNT(*) AS orders, SUM(item.price * item.quantity) AS total
FROM customer
JOIN item ON item.customer_id = customer.id
WHERE item.created_at >= '2024-01-01'
GROUP BY customer.name
ORDER BY total DESC
LIMIT 20;
====
{"station": "harbour", "readings": [{"hour": 6, "celsius": 11.5, "wind": "NW"}, {"hour": 12, "celsius": 16.0, "wind": "W"}, {"hour": 18,
"celsius": 14.2, "wind": "W"}], "complete": true}
====
async function loadPage(url) {
  const response = await fetch(url);
  if (!response.ok) {
    throw new Error(`status ${response.status}`);
  }
  return response.json();
}
====
A train travels 180 kilometres in 2 hours and 15 minutes. Its mean speed is 180 / 2.25 = 80 kilometres an hour. If it keeps that speed,
the next 60 kilometres take it 60 / 80 = 0.75 hours, that is 45 minutes.
====
One, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen, sixteen, seventeen, eighteen,
nineteen, twenty.
====
User: My bicycle tyre loses air overnight. What should I check first?
Assistant: Start with the valve: wet it and look for bubbles. If there are none, take the tube out, pump it up and hold it under water;
a line of small bubbles shows the hole.
User: And if I find none?
====
System: You answer in one sentence.
User: Why is the sky blue?
Assistant: Air scatters blue light more than red, so that blue reaches us from all over the sky.
User: And red at sunset?
Assistant: The light then crosses much more air, which takes the blue out of it.
"""
PASSAGES: tuple[str, ...] = tuple(_TEXT.split("\n====\n"))
"""Written for this purpose; the facts in them are common knowledge."""

Source = Literal["passages", "dataset", "arbitrary"]


@dataclass(frozen=True)
class TokenSet:
    """Token ids of some texts, each on its own."""

    source: Source
    """`arbitrary`: no texts but numbers drawn by a fixed seed, where a folder has no tokenizer that works; perplexity says nothing then."""
    sequences: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.sequences))


def passages(folder: Path, *, vocab_size: int, max_tokens: int = GATE_TOKENS) -> TokenSet:
    """The built-in passages by the tokenizer in `folder`, each cut so that all are at most `max_tokens` together.

    Passages with a token that is not below `vocab_size` are left out. Without a tokenizer, arbitrary ids.
    """
    tokenized = _tokenized(folder)
    share = max(2, max_tokens // len(PASSAGES))
    kept = [tuple(ids[:share]) for ids in tokenized if len(ids) > 1 and max(ids[:share]) < vocab_size]
    return TokenSet("passages", tuple(kept)) if kept else arbitrary(vocab_size=vocab_size)


def arbitrary(*, vocab_size: int) -> TokenSet:
    """Ids drawn evenly from the whole vocabulary, always the same."""
    drawn = random.Random(_SEED)
    rows = (tuple(drawn.randrange(vocab_size) for _ in range(_ARBITRARY_TOKENS)) for _ in range(_NUM_ARBITRARY))
    return TokenSet("arbitrary", tuple(rows))


def dataset_rows(folder: Path, *, vocab_size: int, max_tokens: int, row_tokens: int = ROW_TOKENS) -> TokenSet:
    """Rows of a prepared dataset (of pairs, the chosen ones), spread evenly over it, each cut to `row_tokens`.

    There are at most `max_tokens` together, and only these are read. Raises InvalidArgumentError (code `invalid_dataset`) for a folder
    without rows, a shard of another form, or a token id that is not below `vocab_size`.
    """
    shards = [_Shard(path) for path in sorted(folder.glob("shard-*.safetensors"))]
    num_tokens = sum(min(length, row_tokens) for shard in shards for length in shard.row_lengths)
    if not num_tokens:
        raise _invalid(f"The dataset in {folder.name} has no rows; prepare it again.")
    step = max(1, -(-num_tokens // max(1, max_tokens)))
    rows: list[tuple[int, ...]] = []
    left = max_tokens
    for row in _rows(shards, step):
        ids = row(min(row_tokens, left))
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise _invalid(
                f"input_ids: got {min(ids)} to {max(ids)}, wanted ids below {vocab_size}; prepare the dataset with this base model."
            )
        left -= len(ids)
        if len(ids) > 1:
            rows.append(ids)
        if left <= 0:
            break
    return TokenSet("dataset", tuple(rows))


def _tokenized(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return [cast("list[int]", tokenizer(text)["input_ids"]) for text in PASSAGES]
    except Exception:  # noqa: BLE001  libraries of several languages read these files; whatever they raise, there is no tokenizer
        return []


class _RowReader:
    """One row, not yet read."""

    def __init__(self, ids: StoredTensor, start: int, end: int) -> None:
        self._ids = ids
        self._start = start
        self._end = end

    def __call__(self, max_tokens: int) -> tuple[int, ...]:
        data = torch.empty(min(self._end - self._start, max_tokens) * self._ids.dtype.itemsize, dtype=torch.uint8)
        self._ids.read_into(data, start=self._start * self._ids.dtype.itemsize)
        return tuple(data.view(self._ids.dtype).tolist())


class _Shard:
    def __init__(self, path: Path) -> None:
        tensors = read_header(path)
        prefix = "chosen_" if "chosen_input_ids" in tensors else ""
        try:
            self._ids = tensors[f"{prefix}input_ids"]
            self._offsets = cast("list[int]", tensors[f"{prefix}row_offsets"].read().tolist())
        except KeyError as error:
            raise _invalid(f"{path.name} has no {error}; prepare the dataset again.") from error
        in_order = all(start <= end for start, end in zip(self._offsets, self._offsets[1:], strict=False))
        if not self._offsets or not in_order or self._offsets[0] != 0 or self._offsets[-1] != self._ids.num_elements:
            raise _invalid(f"{path.name}: row_offsets and input_ids do not fit together; prepare the dataset again.")

    @property
    def num_rows(self) -> int:
        return len(self._offsets) - 1

    @property
    def row_lengths(self) -> list[int]:
        return [end - start for start, end in zip(self._offsets, self._offsets[1:], strict=False)]

    def row(self, index: int) -> _RowReader:
        return _RowReader(self._ids, self._offsets[index], self._offsets[index + 1])


def _rows(shards: Sequence[_Shard], step: int) -> Iterator[_RowReader]:
    """Every `step`th row of all shards."""
    index = 0
    for shard in shards:
        while index < shard.num_rows:
            yield shard.row(index)
            index += step
        index -= shard.num_rows


def _invalid(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, code="invalid_dataset")
