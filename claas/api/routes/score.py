"""`POST /v1/score`."""

from __future__ import annotations

import math

from fastapi import APIRouter, Request
from starlette.responses import Response

from claas.api.deps import ServicesDep
from claas.api.schemas.models import ScoreRequest, ScoreResponse
from claas.api.streaming import CLIENT_LEFT, UnlessLeft
from claas.inference.base import GenerationRequest

router = APIRouter(tags=["serving"])


@router.post("/v1/score", response_model=ScoreResponse, summary="How likely a given reply is")
async def score(body: ScoreRequest, request: Request, services: ServicesDep) -> Response:
    """Logprobs of `completion`, token by token, as the model's reply to `messages`. Nothing is sampled or stored."""
    asked = GenerationRequest(
        messages=tuple(message.to_core() for message in body.messages),
        template_kwargs=body.chat_template_kwargs or {},
        adapter=await services.lifecycle.resolve_model(body.model),
    )
    async with UnlessLeft(request.receive) as client:
        found = await services.inference.score(asked, body.completion)
    if client.left:
        return Response(status_code=CLIENT_LEFT)
    answer = ScoreResponse(
        model=body.model,
        prompt_tokens=found.prompt_tokens,
        completion_tokens=len(found.token_ids),
        tokens=list(found.tokens),
        token_ids=list(found.token_ids),
        logprobs=list(found.logprobs),
        logprob_sum=math.fsum(found.logprobs),
    )
    return Response(answer.model_dump_json(), media_type="application/json")
