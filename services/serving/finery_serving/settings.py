"""What serving reads from the environment beyond what every service does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from finery_common.errors import FailedPreconditionError
from finery_common.settings import ServiceSettings
from finery_serving.vllm_endpoint import TlsEndpoint

_MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def _is_known_rank(value: int) -> int:
    if value and value not in _MAX_LORA_RANKS:
        raise ValueError(f"wanted one of {', '.join(map(str, _MAX_LORA_RANKS))}: vLLM knows no others")
    return value


class ServingSettings(ServiceSettings):
    """Serving's settings, prefix FINERY_."""

    vllm_python: Path | None = None
    """Python of the virtual environment that has vLLM."""
    serving_replica: str = Field(default="", pattern=r"^[A-Za-z0-9-]*$")
    """Tells agents apart that share a state directory: each has logs, a pid file and copies of adapters of its own."""
    serving_base_model: str = ""
    """Name of the base model to serve; may be empty where the catalogue has one only."""
    serving_device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where there is one."""
    max_loras: int = Field(default=4, ge=1)
    """Distinct adapters in one batch, each with a place on the GPU. vLLM before 0.26 gets as many as `max_cpu_loras`: it would mix
    adapters otherwise."""
    max_cpu_loras: int = Field(default=8, ge=1)
    """Adapters that vLLM holds at once; what is deployed beyond that is loaded when a request asks for it."""
    max_lora_rank: Annotated[int, AfterValidator(_is_known_rank)] = 0
    """Largest rank that can be served; 0: 64 on a GPU, 16 on a CPU, where the time of a prompt grows with this limit, used or not."""
    max_model_len: int = Field(default=0, ge=0)
    """Context length in tokens; 0 takes the model's own."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs of each machine that share every layer of one vLLM."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of each GPU's memory that vLLM takes; its own default where unset."""
    vllm_nodes: int = Field(default=1, ge=1)
    """Machines that one vLLM runs on, each with a share of the layers; on all but the first runs `finery_serving.follower`."""
    vllm_node_rank: int = Field(default=0, ge=0)
    """Which of these machines this one is; a follower's alone."""
    vllm_master_address: str = ""
    """The first of these machines, where there are several."""
    vllm_kv_cache_gib: int = Field(default=2, ge=1)
    """Memory for attention caches in GiB, on a CPU."""
    tool_call_parser: str = Field(default="auto", pattern=r"^[A-Za-z0-9_.-]+$")
    """How the model writes tool calls: a name of vLLM's `--tool-call-parser`; `auto` goes by the chat template; `off` refuses tools."""
    vllm_start_timeout_s: float = Field(default=900.0, gt=0)
    """A vLLM that does not answer by then is killed and started again."""
    drain_s: float = Field(default=8.0, ge=0)
    """How long the requests in flight may go on after SIGTERM; new ones go to other replicas at once."""
    vllm_hang_timeout_s: float = Field(default=60.0, gt=0)
    """A vLLM that has answered no health check for so long is killed and started again."""
    runtime_dir: Path | None = None
    """Short path for sockets, which may have 107 characters at most; a fresh folder under XDG_RUNTIME_DIR or /tmp where unset."""

    vllm_listen_address: str = Field(default="", pattern=r"^$|:\d+$")
    """`host:port` of vLLM's TLS port, for a gateway on another host; where empty vLLM listens on a Unix socket."""
    vllm_advertise_address: str = Field(default="", pattern=r"^$|.:\d+$")
    """`host:port` at which the gateway reaches that port."""
    vllm_tls_cert_file: Path | None = None
    """PEM certificate of that port, for the DNS name `finery-vllm`; read again when it changes."""
    vllm_tls_key_file: Path | None = None
    """PEM key of that certificate."""

    @property
    def replica_dir(self) -> Path:
        """Logs and the pid file of this replica's vLLM."""
        return self.state_dir / "replicas" / self.serving_replica if self.serving_replica else self.state_dir

    @property
    def adapter_cache_dir(self) -> Path:
        """This replica's copies of adapters; what it removes, no other vLLM has."""
        return self.artifact_cache_dir / f"serving{self.serving_replica}"

    def tls(self) -> TlsEndpoint | None:
        """The TLS port; None: a Unix socket. Raises FailedPreconditionError where something that a port needs is missing."""
        if not self.vllm_listen_address:
            return None
        cert, key, ca = self.vllm_tls_cert_file, self.vllm_tls_key_file, self.vllm_ca_file
        if not self.vllm_advertise_address or cert is None or key is None or ca is None:
            wanted = "FINERY_VLLM_ADVERTISE_ADDRESS, FINERY_VLLM_TLS_CERT_FILE, FINERY_VLLM_TLS_KEY_FILE and FINERY_VLLM_CA_FILE"
            raise FailedPreconditionError(f"FINERY_VLLM_LISTEN_ADDRESS: got {self.vllm_listen_address}, which wants {wanted} as well")
        for file in (cert, key, ca):
            if not file.is_file():
                raise FailedPreconditionError(f"FINERY_VLLM_LISTEN_ADDRESS: there is no file {file}, which vLLM's TLS port needs")
        return TlsEndpoint(self.vllm_listen_address, self.vllm_advertise_address, cert, key, ca)
