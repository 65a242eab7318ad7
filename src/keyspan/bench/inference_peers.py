"""A peer of `keyspan bench inference` in a Python environment of its own. Started as a script; imports nothing of ours.

    python inference_peers.py openvino|vllm|llama.cpp FOLDER fp32|bf16 THREADS

Each line of standard input is a JSON list of requests, [prompt tokens, tokens of the answer]; each answer a JSON line:
{"tokens": [[…], …], "times": [[…], …], "seconds": …}, times in seconds from the start.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Requests = list[tuple[list[int], int]]
Events = Iterator[tuple[int, list[int]]]
"""What steps bring: (request, its new tokens)."""


def openvino(folder: str, dtype: str, threads: int) -> Callable[[Requests], Events]:
    """OpenVINO GenAI's continuous batching. The folder is what `optimum-cli export openvino` made of the model."""
    import numpy as np  # type: ignore[import-not-found,unused-ignore]
    import openvino as ov  # type: ignore[import-not-found,unused-ignore]
    import openvino_genai as genai  # type: ignore[import-not-found,unused-ignore]

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    scheduler.enable_prefix_caching = True
    scheduler.max_num_batched_tokens = 512
    precision = {"INFERENCE_PRECISION_HINT": "bf16" if dtype == "bf16" else "f32"}
    options = {
        **precision,
        "INFERENCE_NUM_THREADS": threads,
        "KV_CACHE_PRECISION": precision["INFERENCE_PRECISION_HINT"],
    }
    pipeline: Any = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", options)

    def run(requests: Requests) -> Events:
        handles = []
        for n, (prompt, count) in enumerate(requests):
            config = genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = count, True, False
            tokens = ov.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(pipeline.add_request(n, tokens, config))
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for n, handle in enumerate(handles):
                while handle.can_read():
                    yield n, list(next(iter(handle.read().values())).generated_ids)

    return run


def vllm(folder: str, dtype: str, threads: int) -> Callable[[Requests], Events]:
    """vLLM in this process."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import EngineArgs, LLMEngine, SamplingParams  # type: ignore[import-not-found,unused-ignore]

    names = {"bf16": "bfloat16", "fp32": "float32"}
    engine: Any = LLMEngine.from_engine_args(
        EngineArgs(
            model=folder, dtype=names[dtype], max_model_len=2048, enforce_eager=bool(os.environ.get("EAGER")),
            max_num_batched_tokens=2048,
        )
    )  # fmt: skip
    number = iter(range(10**9))

    def run(requests: Requests) -> Events:
        ids = {}
        for n, (prompt, count) in enumerate(requests):
            id = str(next(number))
            ids[id] = n
            engine.add_request(
                id, {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            )
        had = dict.fromkeys(ids, 0)
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens = list(output.outputs[0].token_ids)
                yield ids[output.request_id], tokens[had[output.request_id] :]
                had[output.request_id] = len(tokens)

    return run


def llama_cpp(file: str, dtype: str, threads: int) -> Callable[[Requests], Events]:
    """llama.cpp's server in this process, by the package xllamacpp; the file is a .gguf of weights in this dtype."""
    import queue
    import threading

    import xllamacpp  # type: ignore[import-not-found,unused-ignore]

    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity = file, 0
    params.n_parallel, params.n_ctx, params.kv_unified = 16, 16384, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    kinds = {"bf16": xllamacpp.ggml_type.GGML_TYPE_BF16, "fp32": xllamacpp.ggml_type.GGML_TYPE_F32}
    params.cache_type_k = params.cache_type_v = kinds[dtype]
    server: Any = xllamacpp.Server(params)

    def run(requests: Requests) -> Events:
        events: queue.Queue[tuple[int, list[int]] | None] = queue.Queue()

        def ask(n: int, prompt: list[int], count: int) -> None:
            def take(chunk: dict[str, Any]) -> None:
                if not isinstance(chunk, dict) or "choices" not in chunk:
                    raise RuntimeError(f"llama.cpp: {chunk}")
                found = chunk["choices"][0]["logprobs"]
                if found:
                    events.put((n, [x["id"] for x in found["content"]]))

            body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True}
            # The ids of tokens come with their probabilities, which after greedy sampling cost nothing.
            try:
                server.handle_completions({**body, "logprobs": 1, "post_sampling_probs": True}, take)
            finally:
                events.put(None)

        for n, (prompt, count) in enumerate(requests):
            threading.Thread(target=ask, args=(n, prompt, count), daemon=True).start()
        left = len(requests)
        while left:
            event = events.get()
            if event is None:
                left -= 1
            else:
                yield event

    return run


def main(kind: str, folder: str, dtype: str, threads: str) -> None:
    os.environ["OMP_NUM_THREADS"] = threads
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    run = {"openvino": openvino, "vllm": vllm, "llama.cpp": llama_cpp}[kind](folder, dtype, int(threads))
    for line in sys.stdin:
        requests = json.loads(line)
        tokens: list[list[int]] = [[] for _ in requests]
        times: list[list[float]] = [[] for _ in requests]
        begin = time.perf_counter()
        for n, new in run(requests):
            tokens[n] += new
            times[n] += [time.perf_counter() - begin] * len(new)
        found = {"tokens": tokens, "times": times, "seconds": time.perf_counter() - begin}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
