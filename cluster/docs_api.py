"""/openapi.json and /docs. The page loads nothing from elsewhere: it works where there is no network."""

from __future__ import annotations

import orjson
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from kvasir.cluster.openapi import document

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Kvasir</title>
<meta name="viewport" content="width=device-width">
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
 summary { cursor: pointer; padding: .3rem 0 } code, pre { font: 14px/1.4 ui-monospace, monospace }
 pre { background: #f4f4f4; padding: 1rem; overflow: auto; max-height: 30rem }
 b { display: inline-block; width: 5rem; font-weight: 600; text-transform: uppercase }
</style>
<h1>Kvasir</h1><p id="about"></p><p><a href="openapi.json">openapi.json</a></p><main></main>
<script>
const add = (to, tag, text) => { const one = document.createElement(tag); one.textContent = text || ""; to.append(one); return one }
const plain = (it, all, depth) => {
  if (Array.isArray(it)) return it.map(x => plain(x, all, depth))
  if (it === null || typeof it !== "object") return it
  if (it.$ref && depth < 4) return plain(all[it.$ref.split("/").pop()], all, depth + 1)
  return Object.fromEntries(Object.entries(it).map(([k, v]) => [k, plain(v, all, depth)]))
}
fetch("openapi.json").then(reply => reply.json()).then(api => {
  about.textContent = api.info.description
  const all = api.components.schemas, main = document.querySelector("main"), tags = {}
  for (const [path, item] of Object.entries(api.paths)) for (const [method, it] of Object.entries(item)) {
    if (method === "parameters") continue
    const tag = it.tags[0]
    tags[tag] = tags[tag] || [add(main, "h2", tag)]
    const box = add(main, "details")
    tags[tag].push(box)
    const head = add(box, "summary")
    add(head, "b", method)
    add(head, "code", path)
    head.append(" " + it.summary)
    box.addEventListener("toggle", () => {
      if (box.childElementCount > 1) return
      for (const [name, part] of [["Query", it.parameters], ["Body", it.requestBody], ["Answers", it.responses]])
        if (part) { add(box, "h4", name); add(box, "pre", JSON.stringify(plain(part, all, 0), null, 1)) }
    })
  }
  for (const parts of Object.values(tags)) main.append(...parts)
})
</script></html>
"""


def docs_routes() -> list[Route]:
    """Both, for everybody: what they say is no secret."""
    dumped: list[bytes] = []

    async def describe(request: Request) -> Response:
        if not dumped:  # made when somebody asks: it takes some milliseconds
            dumped.append(orjson.dumps(document()))
        return Response(dumped[0], media_type="application/json")

    async def show(request: Request) -> Response:
        return HTMLResponse(_PAGE)

    return [
        Route("/openapi.json", describe, methods=["GET"]),
        Route("/docs", show, methods=["GET"]),
    ]
