"""vLLM's pooling runner in an environment of its own, for embeddings_cpu.py, which starts it:

    python embeddings_vllm.py FOLDER fp32|bf16 THREADS

A line "ready", then for each line of standard input, a JSON list of texts, a JSON line: {"embeddings": [[…], …],
"clock": …, "cpu": …}, in seconds.
"""

import json
import os
import sys
import time


def main(folder: str, dtype: str, threads: str) -> None:
    os.environ |= {
        "OMP_NUM_THREADS": threads, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    from vllm import LLM  # type: ignore[import-not-found,unused-ignore]

    names = {"bf16": "bfloat16", "fp32": "float32"}
    eager = bool(os.environ.get("EAGER"))
    model = LLM(folder, runner="pooling", dtype=names[dtype], max_num_batched_tokens=2048, enforce_eager=eager)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        texts = json.loads(line)
        begin = time.perf_counter(), time.process_time()
        found = model.embed(texts, tokenization_kwargs={"truncate_prompt_tokens": -1}, use_tqdm=False)
        embeddings = [list(x.outputs.embedding) for x in found]
        spent = {"clock": time.perf_counter() - begin[0], "cpu": time.process_time() - begin[1]}
        print(json.dumps({"embeddings": embeddings, **spent}), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
