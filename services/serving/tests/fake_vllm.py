"""A stand-in for vLLM's process: our real middleware around an app that loads folders by name and answers at once.

Run as vLLM is, with `--uds` and `--served-model-name`. An adapter folder with a file `refuse` is refused; one with `die` kills the process;
one with `slow` takes a second.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import uvicorn
from finery_vllm_middleware import FineryMiddleware  # pyright: ignore[reportMissingImports]


class Engine:
    async def remove_lora(self, adapter_id):
        return True


def option(name):
    return sys.argv[sys.argv.index(name) + 1]


BASE = option("--served-model-name")
LORAS = {}
STATE = SimpleNamespace(engine_client=Engine(), openai_serving_models=SimpleNamespace(lora_requests=LORAS))


async def app(scope, receive, send):
    assert scope["type"] == "http"
    body = json.loads((await receive())["body"] or b"{}")
    status, answer = await respond(scope["path"], body)
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


async def respond(path, body):
    if path == "/v1/models":
        return 200, {"data": [{"id": BASE, "max_model_len": 128}]}
    if path == "/v1/load_lora_adapter":
        if (Path(body["lora_path"]) / "slow").exists():
            await asyncio.sleep(1)
        return load(body["lora_name"], Path(body["lora_path"]))
    if path == "/v1/unload_lora_adapter":
        LORAS.pop(body["lora_name"], None)
    if path == "/v1/completions":
        if body["model"] not in (BASE, *LORAS):
            return 404, {"error": {"message": "no such model", "code": 404}}
        await asyncio.sleep(float(body.get("user") or 0))
        return 200, {"model": body["model"], "usage": {"completion_tokens": body["max_tokens"]}}
    return 200, {}


def load(name, path):
    if (path / "die").exists():
        os._exit(1)
    if (path / "refuse").exists() or name in LORAS:
        return 500, {"error": {"message": f"cannot load {path}", "code": 500}}
    LORAS[name] = SimpleNamespace(lora_int_id=len(LORAS) + 1, lora_path=str(path))
    return 200, {}


async def with_app_state(scope, receive, send):
    await FINERY({**scope, "app": SimpleNamespace(state=STATE)}, receive, send)


if __name__ == "__main__":
    FINERY = FineryMiddleware(app)
    uvicorn.run(with_app_state, uds=option("--uds"), lifespan="off", log_level="warning")
