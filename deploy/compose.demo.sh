#!/bin/sh
# The sample pipelines of `tailspan demo`, repeatedly: one succeeds, one fails, one shows progress, one times out.
while true; do
  tailspan run --name weather-etl -- python -m tailspan_agent.commands.demo_pipelines.weather_etl
  tailspan run --name invoice-import -- python -m tailspan_agent.commands.demo_pipelines.invoice_import
  tailspan run --name tile-render -- python -m tailspan_agent.commands.demo_pipelines.tile_render
  tailspan run --name backfill-year --timeout "${DEMO_TIMEOUT:-45}" -- python -m tailspan_agent.commands.demo_pipelines.backfill_year
  sleep "${DEMO_PAUSE:-15}"
done >/dev/null 2>&1
