"""`POST /v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from claas.api.deps import ServicesDep
from claas.api.formats import ChatFormat
from claas.api.route import BodyRoute
from claas.api.schemas.chat import ChatCompletion, ChatCompletionRequest
from claas.api.serving import Ask
from claas.api.streaming import Answer
from claas.core.types import SamplingParams

router = APIRouter(tags=["serving"], route_class=BodyRoute)


@router.post("/v1/chat/completions", response_model=ChatCompletion, summary="Chat with the base model or an adapter")
async def create_chat_completion(body: ChatCompletionRequest, services: ServicesDep) -> Response:
    """OpenAI's chat completions, whole or (`stream`) token by token. The answer's `id` takes feedback at once."""
    tools = tuple(tool.to_core() for tool in body.tools or ())
    ask = Ask(
        model=body.model,
        messages=tuple(message.to_core() for message in body.messages),
        tools=tools,
        tool_choice=body.tool_choice if tools else None,
        parallel_tool_calls=body.parallel_tool_calls if tools else None,
        response_format=body.response_format.to_core() if body.response_format else None,
        template_kwargs=body.chat_template_kwargs or {},
        n=body.n or 1,
        sampling=SamplingParams(
            max_tokens=body.max_completion_tokens or body.max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            stop=tuple(body.stop or ()),
            top_logprobs=body.top_logprobs or 0,
        ),
    )
    wording = ChatFormat(ask, services.inference.token_text, logprobs=bool(body.logprobs), include_usage=body.include_usage)
    return Answer(services, ask, wording, stream=bool(body.stream))
