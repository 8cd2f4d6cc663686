"""The routes of `ggmq serve`, and what every one of them does with what goes wrong."""

from __future__ import annotations

import os
import traceback
from collections.abc import Awaitable, Callable, Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ggmq.log import Log
from ggmq.server import chat, cluster, completions, embeddings, messages, native, page, responses
from ggmq.server.access import Access, is_anthropic
from ggmq.server.bodies import ClientGone
from ggmq.server.context import ERROR, ROUTE, Context
from ggmq.server.counts import Metrics
from ggmq.server.errors import ApiError, of_ggmq
from ggmq.server.metrics import StateCollector, show_metrics
from ggmq.server.options import ServerOptions
from ggmq.server.watched import Watched
from ggmq.service import Service
from ggmq.watching import Picture
from protocol.errors import GgmqError

Handler = Callable[[Context, Request], Awaitable[Response]]
ROUTES: Mapping[str, Mapping[str, Handler]] = {
    "/v1/chat/completions": {"POST": chat.chat_completions},
    "/v1/completions": {"POST": completions.completions},
    "/v1/responses": {"POST": responses.responses},
    "/v1/responses/{id}": {"GET": responses.retrieve, "DELETE": responses.delete},
    "/v1/embeddings": {"POST": embeddings.embeddings},
    "/v1/messages": {"POST": messages.messages},
    "/v1/messages/count_tokens": {"POST": messages.count_tokens},
    "/v1/models": {"GET": native.models},
    "/v1/models/{id:path}": {"GET": native.model},
    "/tokenize": {"POST": native.tokenize},
    "/detokenize": {"POST": native.detokenize},
    "/apply-template": {"POST": native.apply_template},
    "/props": {"GET": native.props},
    "/slots": {"GET": native.slots},
    "/health": {"GET": native.health},
    "/metrics": {"GET": show_metrics},
    "/cluster": {"GET": cluster.cluster},
    "/cluster/events": {"GET": cluster.cluster_events},
}


def make_app(
    services: Mapping[str, Service], options: ServerOptions, picture: Callable[[], Picture], log: Log, metrics: Metrics
) -> Starlette:
    """The application over services that answer. picture: what the bus does, as `BusWatch` has it.

    Its `state.context` is what ends answers when the server does.
    """
    context = Context(services, options, picture, log, metrics)
    metrics.registry.register(StateCollector(context))
    app = Starlette(
        routes=[
            *page.routes(),
            *(_route(context, path, handlers) for path, handlers in ROUTES.items()),
        ],
        middleware=[Middleware(Watched, metrics=metrics, log=log), Middleware(Access, options=options)],
        exception_handlers={HTTPException: _refused},
    )
    app.router.redirect_slashes = False
    app.state.context = context
    return app


def _route(context: Context, path: str, handlers: Mapping[str, Handler]) -> Route:
    async def endpoint(request: Request) -> Response:
        request.scope[ROUTE] = path
        try:
            return await handlers["GET" if request.method == "HEAD" else request.method](context, request)
        except ApiError as e:
            error = e
        except ClientGone:
            return Response(status_code=499)  # nobody reads it
        except GgmqError as e:
            error = of_ggmq(e)
        except Exception as e:
            error = internal(context, e)
        request.scope[ERROR] = error.code
        return error.response(is_anthropic(path))

    return Route(path, endpoint, methods=list(handlers))


def internal(context: Context, e: Exception) -> ApiError:
    """A bug of ours: where it is stands in the log, and is not told to whoever asked."""
    if os.environ.get("GGMQ_DEBUG"):
        traceback.print_exception(e)
    where = traceback.extract_tb(e.__traceback__)[-1]
    context.log.event("error", "bug", kind=type(e).__name__, function=where.name, line=where.lineno)
    return ApiError(500, "internal error; the server's log has it", "internal")


def _refused(request: Request, e: Exception) -> Response:
    """There is no such route, or not for this method."""
    assert isinstance(e, HTTPException)  # that is what it is registered for
    path, method = request.url.path, request.method
    if e.status_code == 405:
        allowed = (e.headers or {}).get("Allow", "")
        error = ApiError(405, f"{method[:16]} {path[:256]}: expected {allowed}", "method_not_allowed",
                         headers={"Allow": allowed})  # fmt: skip
    else:
        error = ApiError(404, f"there is no {path[:256]} here; docs/serving.md lists what there is", "unknown_url")
    return error.response(is_anthropic(path))
