"""lm-eval's local-completions client, unmodified. argv: base URL, key, model, tokenizer's folder, JSON pairs."""

import json
import os
import sys

url, key, model, tokenizer, pairs = sys.argv[1:]
os.environ["OPENAI_API_KEY"] = key

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: E402

client = LocalCompletionsAPI(
    base_url=f"{url}/completions",
    model=model,
    tokenizer=tokenizer,
    tokenizer_backend="huggingface",
    max_retries=1,
)
asked = [
    Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=number)
    for number, pair in enumerate(json.loads(pairs))
]
print(json.dumps([[float(value), bool(greedy)] for value, greedy in client.loglikelihood(asked)]))
