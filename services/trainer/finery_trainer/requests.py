"""What CreateJob accepts: every refusal that is possible before a job exists. Rows of a file are dataprep's to judge."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from finery_common.artifacts import ArtifactStore
from finery_common.catalogue import BaseModelEntry, Catalogue, read_config, tensor_names
from finery_common.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, UnavailableError
from finery_common.spec import LoraBias, MethodType, TrainingSpec
from finery_trainer.client import ServingClient
from finery_trainer.machine import check_machine
from finery_trainer.records import JobRequest

MAX_METADATA_PAIRS, MAX_KEY_LENGTH, MAX_VALUE_LENGTH = 16, 64, 512
_FILE = re.compile(r"file-[0-9a-f]{24}")
_NO_LINEAR = re.compile(r"norm|embed|^[0-9]+$|^ln_")
_SUFFIX = re.compile(r"[a-z0-9-]{0,64}")


class RequestChecks:
    """`serving` is None where this installation serves nothing. `count_gpus` says how many a worker may use, and may block."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        cache_dir: Path,
        artifacts: ArtifactStore,
        serving: ServingClient | None,
        count_gpus: Callable[[], int],
    ) -> None:
        self._catalogue = catalogue
        self._cache_dir = cache_dir
        self._artifacts = artifacts
        self._serving = serving
        self._count_gpus = count_gpus

    async def check(self, request: JobRequest, *, project: str, metadata: Mapping[str, str]) -> None:
        """Raises InvalidArgumentError, NotFoundError or FailedPreconditionError, each with the field at fault."""
        check_suffix(request.suffix)
        check_metadata(metadata)
        entry = self._catalogue.get(request.spec.base_model)
        check_sequence_length(request.spec, entry)
        if request.spec.gpus > 1:
            config = await asyncio.to_thread(read_config, entry, cache_dir=self._cache_dir, store=self._artifacts)
            await asyncio.to_thread(check_gpus, request.spec, config)
            # Packages are the worker's to judge, which may have other ones.
            check_machine(request.spec, num_gpus=await asyncio.to_thread(self._count_gpus), has_bitsandbytes=True)
        if entry.path is not None:
            await asyncio.to_thread(check_target_modules, request.spec, entry.path)
        await self._check_servable(request, project=project)
        await self._check_file(request.training_file, project=project, param="training_file")
        if request.validation_file is not None:
            await self._check_file(request.validation_file, project=project, param="validation_file")

    async def _check_file(self, file: str, *, project: str, param: str) -> None:
        if not _FILE.fullmatch(file):
            raise InvalidArgumentError(
                f"{param}: got {file!r}, wanted the id of an uploaded file, file-… with 24 hexadecimal digits.", param=param
            )
        if not await asyncio.to_thread(self._artifacts.exists, f"projects/{project}/files/{file}/"):
            raise NotFoundError(
                f"{param}: there is no file {file} in this project; upload it first, or list files to see what there is.", param=param
            )

    async def _check_servable(self, request: JobRequest, *, project: str) -> None:
        if request.deploy is False:
            return
        if self._serving is None:
            if request.deploy:
                raise FailedPreconditionError(
                    "deploy: this installation serves no models; create the job with deploy false.", param="deploy"
                )
            return
        check_servable(request.spec)
        try:
            bases = await self._serving.served_bases(project)
        except UnavailableError:
            # The deployment is retried when the model is there; a job need not wait for serving.
            return
        base = bases.get(request.spec.base_model)
        if base is None and request.deploy:
            known = ", ".join(bases) or "none"
            raise FailedPreconditionError(
                f"deploy: {request.spec.base_model} is not being served (there is: {known}); create the job with deploy false.",
                param="deploy",
            )
        if base is not None and request.spec.lora.rank > base.max_lora_rank:
            raise InvalidArgumentError(
                f"spec.lora.rank: got {request.spec.lora.rank}, adapters up to rank {base.max_lora_rank} can be served; "
                "lower it, or create the job with deploy false.",
                param="spec.lora.rank",
            )


def check_sequence_length(spec: TrainingSpec, entry: BaseModelEntry) -> None:
    """Raises InvalidArgumentError for rows longer than the base model takes."""
    if spec.max_sequence_length > entry.max_sequence_length:
        raise InvalidArgumentError(
            f"spec.max_sequence_length: got {spec.max_sequence_length}, wanted at most {entry.max_sequence_length} for {entry.name}.",
            param="spec.max_sequence_length",
        )


def check_gpus(spec: TrainingSpec, config: Mapping[str, object]) -> None:
    """Raises FailedPreconditionError for several GPUs and a base model, by its `config.json`, that only one can train. Blocks."""
    from finery_trainer.engine.configs import not_own

    if spec.gpus > 1 and (reason := not_own(config)) is not None:
        raise FailedPreconditionError(
            f"spec.gpus: got {spec.gpus}, wanted 1 for {spec.base_model}, whose layers the engine has not ({reason}); set it to 1.",
            param="spec.gpus",
        )


def check_target_modules(spec: TrainingSpec, base_dir: Path) -> None:
    """Raises InvalidArgumentError for adapters on what the base model in `base_dir` has not, by the names in its files. Blocks.

    Names only: whether a module is a linear layer is told when the model is loaded, and so is what is wrong with the files.
    """
    tensors = (name.split(".") for name in tensor_names(base_dir))
    # A head that is tied to the embeddings is in no file.
    known = {parts[-2] for parts in tensors if len(parts) > 1 and not _NO_LINEAR.search(parts[-2])} | {"lm_head"}
    for target in spec.lora.target_modules if spec.method is not MethodType.FULL and len(known) > 1 else ():
        if target.rpartition(".")[2] not in known:
            raise InvalidArgumentError(
                f"spec.lora.target_modules: got {target!r}, which {spec.base_model} has not; it has {', '.join(sorted(known))}.",
                param="spec.lora.target_modules",
            )


def check_servable(spec: TrainingSpec) -> None:
    """Raises InvalidArgumentError for what vLLM cannot serve as an adapter, whatever its limits."""
    if spec.method is MethodType.FULL:
        raise InvalidArgumentError(
            "spec.method: got 'full', whose result is a whole model and no adapter to serve beside a base; "
            "create the job with deploy false. To serve its model then, give the catalogue an entry whose s3_prefix is the job's model.",
            param="spec.method",
        )
    if spec.lora.use_dora:
        raise InvalidArgumentError(
            "spec.lora.use_dora: got true, an adapter with magnitudes cannot be served; use false, or create the job with deploy false.",
            param="spec.lora.use_dora",
        )
    if spec.lora.bias is not LoraBias.NONE:
        raise InvalidArgumentError(
            f"spec.lora.bias: got {spec.lora.bias.value!r}, an adapter with biases cannot be served; "
            "use none, or create the job with deploy false.",
            param="spec.lora.bias",
        )


def check_suffix(suffix: str) -> None:
    """Raises InvalidArgumentError for what cannot be part of a model's name."""
    if "/" in suffix:
        raise InvalidArgumentError(
            f"suffix: got {suffix!r}, which holds a slash; use a-z, 0-9 and - only, such as my-model.", param="suffix"
        )
    if not _SUFFIX.fullmatch(suffix):
        raise InvalidArgumentError(f"suffix: got {suffix!r}, wanted up to 64 of a-z, 0-9 and -.", param="suffix")


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raises InvalidArgumentError past OpenAI's limits: 16 pairs, keys of 64 characters, values of 512."""
    if len(metadata) > MAX_METADATA_PAIRS:
        raise InvalidArgumentError(f"metadata: got {len(metadata)} pairs, wanted at most {MAX_METADATA_PAIRS}.", param="metadata")
    for key, value in metadata.items():
        if not 1 <= len(key) <= MAX_KEY_LENGTH:
            raise InvalidArgumentError(f"metadata: got a key of {len(key)} characters, wanted 1 to {MAX_KEY_LENGTH}.", param="metadata")
        if len(value) > MAX_VALUE_LENGTH:
            raise InvalidArgumentError(
                f"metadata.{key}: got a value of {len(value)} characters, wanted at most {MAX_VALUE_LENGTH}.", param=f"metadata.{key}"
            )
