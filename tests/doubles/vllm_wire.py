"""vLLM's wire, for its double: what a request may hold, how vLLM refuses it, and the shapes of answers and of streamed chunks.

Field names, texts and the order of checks are those of vLLM 0.32. A field that vLLM would silently ignore is reported, not refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.doubles.vllm_engine import Adapter, Refused, Run, VllmEngine
from tests.doubles.vllm_script import BASE_VOICE, Asked, Limits, Part, Step, deltas, parts

Kind = Literal["chat", "text"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


COMMON = _names(
    "model stream stream_options max_tokens temperature top_p top_k min_p seed stop stop_token_ids ignore_eos min_tokens n "
    "frequency_penalty presence_penalty repetition_penalty logit_bias logprobs prompt_logprobs user include_stop_str_in_output "
    "skip_special_tokens spaces_between_special_tokens return_token_ids return_tokens_as_token_ids response_format structured_outputs "
    "priority request_id cache_salt add_special_tokens allowed_token_ids bad_words echo truncate_prompt_tokens vllm_xargs stream_interval"
)
KNOWN: Mapping[Kind, frozenset[str]] = {
    "chat": COMMON
    | _names(
        "messages max_completion_tokens top_logprobs tools tool_choice parallel_tool_calls include_reasoning reasoning_effort "
        "chat_template chat_template_kwargs add_generation_prompt continue_final_message documents return_prompt_text"
    ),
    "text": COMMON | frozenset({"prompt", "suffix"}),
}


def refuse(message: str, param: str | None = None, value: object = None, *, named: str | None = None) -> Refused:
    """A 400 as vLLM words it: the parameter and its value stand behind the message. `named` goes into `param` alone."""
    extras = [f"parameter={param}"] if param else []
    extras += [f"value={value}"] if value is not None else []
    return Refused(400, "BadRequestError", f"{message} ({', '.join(extras)})" if extras else message, param or named)


def missing(name: str, body: Mapping[str, Any]) -> Refused:
    detail = {"type": "missing", "loc": f"body.{name}", "msg": "Field required", "input": f"<dict of {len(body)} items>"}
    return Refused(400, "Bad Request", f"1 validation error:\n  {detail}", f"body.{name}")


def error_body(refused: Refused) -> dict[str, Any]:
    return {"error": {"message": refused.message, "type": refused.kind, "param": refused.param, "code": refused.status}}


@dataclass(frozen=True, slots=True)
class Parsers:
    """What the server was started with: `--tool-call-parser`, `--enable-auto-tool-choice`, `--reasoning-parser`."""

    tools: bool = True
    auto: bool = True
    reasoning: bool = True


@dataclass(eq=False, slots=True)
class Request:
    """A request that vLLM would run: one `Run` for each choice, and how its answer is to look."""

    kind: Kind
    body: Mapping[str, Any]
    id: str
    prompt: tuple[int, ...]
    adapter: Adapter | None
    runs: list[Run]
    scripts: list[list[Part]]
    parsed: bool
    created: int
    at: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    called: set[int] = field(default_factory=set)

    @property
    def wants_ids(self) -> bool:
        return bool(self.body.get("return_token_ids"))

    @property
    def named_choice(self) -> bool:
        return isinstance(self.body.get("tool_choice"), dict)


def read(engine: VllmEngine, kind: Kind, body: Mapping[str, Any], request_id: str, parsers: Parsers, draw: int, created: int) -> Request:
    """Check a request in vLLM's order and lay out its replies.

    Raises:
        Refused: as vLLM would.
    """
    needed = "messages" if kind == "chat" else "prompt"
    if needed not in body:
        raise missing(needed, body)
    if unknown := sorted(body.keys() - KNOWN[kind]):
        engine.violations.append(f"{kind} fields that vLLM ignores: {unknown}")
    if kind == "chat":
        _check_chat(body, parsers)
    model = body.get("model") or engine.model
    if model != engine.model and model not in engine.adapters:
        text = f"The model `{model}` does not exist. Valid aliases: {engine.model}."
        raise Refused(404, "NotFoundError", text, "model")
    adapter = engine.adapters.get(model)
    prompt = _prompt(engine, kind, body)
    limits = _limits(engine, body, len(prompt))
    n = body.get("n") or 1
    greedy = body.get("temperature", 1.0) == 0
    if greedy and n > 1:
        raise refuse(f"n must be 1 when using greedy sampling, got {n}.")
    parsed = kind == "chat" and (parsers.tools or parsers.reasoning)
    runs, scripts = [], []
    for index in range(n):
        dice = 0 if greedy else (body["seed"] if body.get("seed") is not None else draw) * 31 + index + 1
        voice = adapter.voice if adapter else BASE_VOICE
        said = engine.script(Asked(voice, engine.tokenizer.decode(prompt), dice, _callable_tools(body)))
        script = parts(said, parsed=parsed)
        scripts.append(script)
        scored = body.get("prompt_logprobs") is not None
        runs.append(Run(prompt, "".join(part.text for part in script), limits, adapter, scored))
    return Request(kind, body, request_id, prompt, adapter, runs, scripts, parsed, created)


def _callable_tools(body: Mapping[str, Any]) -> tuple[str, ...]:
    choice = body.get("tool_choice", "auto")
    if choice == "none":
        return ()
    if isinstance(choice, dict):
        return (choice["function"]["name"],)
    return tuple(tool["function"]["name"] for tool in body.get("tools") or ())


def _check_chat(body: Mapping[str, Any], parsers: Parsers) -> None:
    if not isinstance(body["messages"], list):
        detail = {"type": "list_type", "loc": "body.messages", "msg": "Input should be a valid list", "input": body["messages"]}
        raise Refused(400, "Bad Request", f"1 validation error:\n  {detail}", "body.messages")
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise refuse("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    tools, choice = body.get("tools"), body.get("tool_choice")
    if tools == []:
        raise refuse("`tools` must not be an empty array. Either provide at least one tool or omit the field entirely.", "tools")
    if choice in (None, "none"):
        choice = "auto" if tools and choice is None else "none"
    elif not tools:
        raise refuse("When using `tool_choice`, `tools` must be set.", "tool_choice")
    elif choice not in ("auto", "required") and not isinstance(choice, dict):
        allowed = 'Only named tools, "none", "auto" or "required" are supported.'
        raise refuse(f"Invalid value for `tool_choice`: {choice}! {allowed}", "tool_choice")
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        if name not in [tool["function"]["name"] for tool in tools or ()]:
            raise refuse("The tool specified in `tool_choice` does not match any of the specified `tools`", "tool_choice")
        if not parsers.tools:
            raise refuse(f'tool_choice=function "{name}" requires --tool-call-parser to be set')
    elif choice == "required" and not parsers.tools:
        raise refuse('tool_choice="required" requires --tool-call-parser to be set')
    elif choice == "auto" and not (parsers.tools and parsers.auto):
        raise refuse('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set')


def _prompt(engine: VllmEngine, kind: Kind, body: Mapping[str, Any]) -> tuple[int, ...]:
    if kind == "chat":
        tools = {"tools": body["tools"]} if body.get("tools") else {}
        kwargs = tools | (body.get("chat_template_kwargs") or {})
        text = engine.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True, **kwargs)
        ids = tuple(engine.tokenizer.encode(text, add_special_tokens=False))
    elif isinstance(body["prompt"], str):
        ids = tuple(engine.tokenizer.encode(body["prompt"]))
    else:
        ids = tuple(body["prompt"])
        if not ids:
            raise refuse("You must pass at least one prompt")
        if (largest := max(ids)) >= len(engine.tokenizer):
            raise refuse(f"Token id {largest} is out of vocabulary")
    return ids


def _limits(engine: VllmEngine, body: Mapping[str, Any], prompt: int) -> Limits:
    chosen = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    wanted, most = body.get(chosen), engine.max_model_len
    if wanted is not None and wanted > most:
        text = f"{chosen}={wanted} cannot be greater than max_model_len={most}. Please request fewer output tokens."
        raise refuse(text, chosen, wanted)
    if prompt > most:
        text = f"This model's maximum context length is {most} tokens. However, your prompt contains {prompt} input tokens, which exceeds "
        text += "this limit even without any output tokens. Please reduce the length of the input prompt."
        raise refuse(text, "input_tokens", prompt)
    default = 16 if "prompt" in body else most
    limit = min(most - prompt, default if wanted is None else wanted)
    if limit < 1:
        raise refuse(f"max_tokens must be at least 1, got {limit}.", "max_tokens", limit)
    if (temperature := body.get("temperature") or 0.0) < 0:
        raise refuse(f"temperature must be non-negative, got {float(temperature)}.", "temperature", float(temperature))
    asked = body.get("top_logprobs") if isinstance(body.get("logprobs"), bool) else body.get("logprobs")
    if (asked or 0) > engine.max_logprobs:
        text = f"Requested sample logprobs of {asked}, which is greater than max allowed: {engine.max_logprobs}"
        raise refuse(text, "logprobs", asked)
    stop = body.get("stop") or []
    return Limits(
        max_tokens=limit,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=frozenset(body.get("stop_token_ids") or ()),
        ignore_eos=bool(body.get("ignore_eos")),
        include_stop=bool(body.get("include_stop_str_in_output")),
    )


# Answers


def usage(request: Request) -> dict[str, Any]:
    prompt, completion = len(request.prompt), sum(len(run.tokens) for run in request.runs)
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def head(request: Request, engine: VllmEngine, *, chunk: bool) -> dict[str, Any]:
    names = {"chat": "chat.completion.chunk" if chunk else "chat.completion", "text": "text_completion"}
    name = request.adapter.name if request.adapter else engine.model
    return {"id": request.id, "object": names[request.kind], "created": request.created, "model": name}


def first_chunk(request: Request, index: int) -> dict[str, Any]:
    """Chat only: the role, and with it the prompt's ids."""
    choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    return {"choices": [choice], "prompt_token_ids": list(request.prompt) if request.wants_ids else None, "prompt_text": None}


def next_chunk(request: Request, engine: VllmEngine, index: int, steps: Sequence[Step]) -> dict[str, Any] | None:
    """One chunk for one or more steps; None for an abort before any token, which vLLM does not send."""
    run, ids = request.runs[index], [step.token for step in steps if step.token is not None]
    sent = request.sent.get(index, 0)
    new = range(sent, sent + len(ids))  # the engine may be ahead of what was sent
    request.sent[index] = new.stop
    if not new.stop and steps[-1].finish == "abort":
        return None
    finish = steps[-1].finish
    choice: dict[str, Any] = {"index": index}
    if request.kind == "chat":
        delta = _delta(request, index, steps)
        if finish == "stop" and index in request.called and not request.named_choice:
            finish = "tool_calls"
        choice |= {"delta": delta, "logprobs": _chat_logprobs(request, engine, run, new), "finish_reason": finish}
        if finish:
            choice["stop_reason"] = steps[-1].stop_reason
    else:
        choice |= {"text": "".join(step.text for step in steps), "logprobs": _text_logprobs(request, engine, run, new)}
        choice |= {"finish_reason": finish, "stop_reason": steps[-1].stop_reason}
        choice["prompt_token_ids"] = list(request.prompt) if request.wants_ids and not sent else None
    choice["token_ids"] = ids if request.wants_ids else None
    return {"choices": [choice]}


def _delta(request: Request, index: int, steps: Sequence[Step]) -> dict[str, Any]:
    begin = request.at.get(index, 0)
    text = "".join(step.text for step in steps)
    request.at[index] = begin + len(text)
    if not request.parsed:
        return {"content": text}
    delta: dict[str, Any] = {}
    for part in deltas(request.scripts[index], begin, begin + len(text)):
        if part.kind in ("content", "reasoning"):
            delta[part.kind] = delta.get(part.kind, "") + part.text
        elif part.kind == "name":
            request.called.add(index)
            call = {"id": _call_id(request, index, part), "type": "function", "index": part.call, "function": {"name": part.text}}
            delta.setdefault("tool_calls", []).append(call)
        elif part.kind == "arguments":
            delta.setdefault("tool_calls", []).append({"index": part.call, "function": {"arguments": part.text}})
    return {"content": None} | delta if "tool_calls" in delta else delta


def _call_id(request: Request, index: int, part: Part) -> str:
    return f"chatcmpl-tool-{request.id[-8:]}{index}{part.call}"


def _token_text(request: Request, engine: VllmEngine, token: int) -> str:
    return f"token_id:{token}" if request.body.get("return_tokens_as_token_ids") else engine.tokenizer.decode([token])


def _chat_logprobs(request: Request, engine: VllmEngine, run: Run, new: range) -> dict[str, Any] | None:
    if not request.body.get("logprobs"):
        return None
    top, content = request.body.get("top_logprobs") or 0, []
    for at in new:
        own, *_ = several = [
            {"token": (text := _token_text(request, engine, token)), "logprob": logprob, "bytes": list(text.encode())}
            for token, logprob in engine.logprobs(run, at, max(top, 1))
        ]
        real = engine.tokenizer.decode([run.tokens[at]])
        content.append(own | {"bytes": list(real.encode()), "top_logprobs": several[:top]})
    return {"content": content}


def _text_logprobs(request: Request, engine: VllmEngine, run: Run, new: range) -> dict[str, Any] | None:
    top = request.body.get("logprobs")
    if top is None:
        return None
    offset = sum(len(_token_text(request, engine, token)) for token in run.tokens[: new.start])
    found: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for at in new:
        several = [(_token_text(request, engine, token), logprob) for token, logprob in engine.logprobs(run, at, max(top, 1))]
        found["text_offset"].append(offset)
        found["tokens"].append(several[0][0])
        found["token_logprobs"].append(several[0][1])
        found["top_logprobs"].append(dict(several))
        offset += len(several[0][0])
    return found


def whole(request: Request, engine: VllmEngine, all_steps: Sequence[Sequence[Step]]) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    choices = []
    for index, steps in enumerate(all_steps):
        run = request.runs[index]
        finish, stop_reason, new = steps[-1].finish, steps[-1].stop_reason, range(len(run.tokens))
        choice: dict[str, Any] = {"index": index}
        if request.kind == "chat":
            message = _message(request, index, steps)
            if message.get("tool_calls") and finish == "stop" and not request.named_choice:
                finish = "tool_calls"
            choice |= {"message": message, "logprobs": _chat_logprobs(request, engine, run, new)}
        else:
            choice |= {
                "text": "".join(step.text for step in steps),
                "logprobs": _text_logprobs(request, engine, run, range(len(run.tokens))),
            }
            choice |= {"prompt_logprobs": prompt_logprobs(request, engine)}
            choice |= {"prompt_token_ids": list(request.prompt) if request.wants_ids else None}
        ids = list(run.tokens) if request.wants_ids else None
        choices.append(choice | {"finish_reason": finish, "stop_reason": stop_reason, "token_ids": ids, "routed_experts": None})
    answer = head(request, engine, chunk=False) | {"choices": choices, "system_fingerprint": "vllm-0.32.0-double", "usage": usage(request)}
    if request.kind == "chat":
        answer |= {"prompt_logprobs": prompt_logprobs(request, engine)}
        answer |= {"prompt_token_ids": list(request.prompt) if request.wants_ids else None}
    return answer


def _message(request: Request, index: int, steps: Sequence[Step]) -> dict[str, Any]:
    delta = _delta(request, index, steps)
    calls: dict[int, dict[str, Any]] = {}
    for piece in delta.get("tool_calls", []):
        if "id" in piece:
            calls[piece["index"]] = {
                "id": piece["id"],
                "type": "function",
                "function": {"name": piece["function"]["name"], "arguments": ""},
            }
        else:
            calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    chosen = request.named_choice or request.body.get("tool_choice") == "required"
    content = delta.get("content") or ("" if chosen or not calls else None)
    message = {"role": "assistant", "content": content, "refusal": None, "annotations": None, "audio": None, "function_call": None}
    return message | ({"tool_calls": list(calls.values())} if calls else {}) | {"reasoning": delta.get("reasoning")}


def prompt_logprobs(request: Request, engine: VllmEngine) -> list[dict[str, Any] | None] | None:
    k = request.body.get("prompt_logprobs")
    if k is None:
        return None
    found = engine.prompt_logprobs(request.prompt, request.adapter, k)
    decode = engine.tokenizer.decode
    return [
        {str(i): {"logprob": lp, "rank": rank, "decoded_token": decode([i])} for i, (lp, rank) in row.items()} if row is not None else None
        for row in found
    ]


def event(data: Mapping[str, Any] | str) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
