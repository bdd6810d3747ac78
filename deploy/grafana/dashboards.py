"""The dashboards as code: `python deploy/grafana/dashboards.py` writes dashboards/*.json.

    jobs        running jobs, ended jobs, anomalies; links to one job
    job         one run: its trace, lines, progress and receipt
    pipelines   success, durations and errors over many runs
    agent       the agent's own health

Every query uses metric names that OTLP and a scrape of /metrics share, and finds durations as explicit and as native
histograms. Values of variables stand between backticks, where no character of a name has a meaning: as a regular
expression made of literal names where several can be chosen, exact where one run is meant.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    logs,
    loki,
    prometheus,
    stat,
    table,
    tempo,
    timeseries,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import prometheus as prometheus_model
from grafana_foundation_sdk.models import tempo as tempo_model

__all__ = ["DASHBOARDS", "as_json"]

PROMETHEUS = model.DataSourceRef(type_val="prometheus", uid="${prometheus}")
LOKI = model.DataSourceRef(type_val="loki", uid="${loki}")
TEMPO = model.DataSourceRef(type_val="tempo", uid="${tempo}")

CHOSEN = "`${pipeline:regex}`"
PIPELINE = f"cicd_pipeline_name=~{CHOSEN}"
ITS_PIPELINE = "cicd_pipeline_name=`${pipeline:raw}`"
ONE_RUN = f"{ITS_PIPELINE}, cicd_pipeline_run_id=~`${{run_id:regex}}|`"  # the label needs run_id_on_metrics
AGENT = "instance=~`${agent:regex}`"
OF_A_FLEET = "Agents that share jobs; empty for an agent that is alone."
SHOWN = "resource.service.name, resource.cicd.pipeline.run.id, span.cicd.pipeline.result, status, statusMessage"
RUN = "resource.cicd.pipeline.run.id = `${run_id:raw}`"
# The last two conditions: without a name Loki would refuse the query, and without an id every other line has none.
_ITS_RUN = "cicd_pipeline_run_id = `${run_id:raw}` | cicd_pipeline_run_id != ``"
_ITS_STREAMS = "service_name=`${pipeline:raw}`, service_name=~`.+`"
RUN_LINES = f"{{{_ITS_STREAMS}}} | {_ITS_RUN}"
TASK_LINES = f"{RUN_LINES} | cicd_pipeline_task_name =~ `${{task:regex}}`"
# Failures and anomalies are in streams of their own: Loki finds them by its index, without reading the lines.
EVENTS = "service_instance_id=~`events.*`"
RUN_EVENTS = f"{{{_ITS_STREAMS}, {EVENTS}}} | {_ITS_RUN}"
TASK = (
    "span.cicd.pipeline.task.name, span.cicd.pipeline.task.run.result, span.tailspan.task.attempt,"
    " span.tailspan.task.queued_s, span.tailspan.task.id, statusMessage"
)
OUTCOME = "span.cicd.pipeline.result, span.process.exit.code, span.tailspan.exit.reason"
RESULT_COLOURS = {
    "success": "green",
    "failure": "red",
    "error": "dark-red",
    "timeout": "orange",
    "cancellation": "gray",
    "skip": "light-blue",
}

Panel = Builder[model.Panel]


RUNS = "cicd_pipeline_run_duration_seconds"
FAILED = f'{PIPELINE}, cicd_pipeline_result=~"failure|error|timeout"'
SUCCEEDED = f'{PIPELINE}, cicd_pipeline_result="success"'


def ended(metric: str, window: str, by: str = "", matchers: str = PIPELINE) -> str:
    """Return PromQL for how much a counter grew in a window.

    increase() misses a run that is its counter's first sample, and most pipelines run rarely. The agent's counters
    survive its restarts, so a difference is correct. An agent that is away sends nothing for a while: what it counted
    is still shown, and is not counted again when it returns within two weeks.

    Args:
        metric: A counter.
        window: The range to count in, for example ``$__range``.
        by: Labels to keep.
        matchers: Label matchers of the series.
    """
    series = f"{metric}{{{matchers}}}"
    now = latest(series, window)
    return summed(f"clamp_min({now} - {before(series, window)} or {now}, 0)", by)


def latest(series: str, window: str) -> str:
    """Return PromQL for the last value of a series in a window; short windows need not contain one."""
    return f"last_over_time({series}[{window}])" if window == "$__range" else series


def before(series: str, window: str, reach: str = "14d") -> str:
    """Return PromQL for the last value of a series before a window."""
    return f"last_over_time({series}[{reach}] offset {window})"


def summed(expr: str, by: str) -> str:
    """Return the PromQL that adds series up."""
    return f"sum{f' by ({by}) ' if by else ''}({expr})"


def ended_runs(window: str, by: str = "", matchers: str = PIPELINE) -> str:
    """Return PromQL for the number of runs that ended in a window; see `ended`.

    Durations are explicit histograms with a counter of their own, or native ones that contain their count. Both come
    from the same stored counts, so after a change of the kind the larger number is the newer one.
    """
    counter, native = f"{RUNS}_count{{{matchers}}}", f"{RUNS}{{{matchers}}}"
    now = larger(latest(counter, window), latest(native, window))
    return summed(f"clamp_min({now} - {larger(before(counter, window), before(native, window))} or {now}, 0)", by)


def larger(counter: str, native: str) -> str:
    """Return PromQL for the larger of a counter and the count of a native histogram, where both or one exist."""
    return f'max without (kind) ({counter} or label_replace(histogram_count({native}), "kind", "native", "", ""))'


def durations(window: str, by: str = "") -> tuple[str, str]:
    """Return PromQL for the durations of runs that ended in a window: as buckets by ``le``, and as native histograms.

    A bucket or a native histogram that is new while its pipeline is not was made by an update of the agent or by a
    change of its settings: it repeats earlier runs, so its first window counts nothing. The reach is a day, since two
    weeks of all buckets would take seconds to read.
    """
    bucket, native = f"{RUNS}_bucket{{{PIPELINE}}}", f"{RUNS}{{{PIPELINE}}}"
    known = f"unless ignoring (le) {before(f'{RUNS}_count{{{PIPELINE}}}', window)}"
    known += f" unless ignoring (le) {before(native, window)}"
    explicit = f"clamp_min({bucket} - {before(bucket, window, '1d')} or ({bucket} {known}), 0)"
    exponential = f"{native} - {before(native, window, '1d')} or ({native} {known})"
    return summed(explicit, f"le, {by}" if by else "le"), summed(exponential, by)


def promql(
    expr: str,
    legend: str = "",
    *,
    ref: str = "A",
    instant: bool = False,
    exemplar: bool = False,
    form: str = "time_series",
) -> prometheus.Dataquery:
    """Return a query of Prometheus."""
    query = prometheus.Dataquery().datasource(PROMETHEUS).expr(expr).ref_id(ref)
    query = query.format(prometheus_model.PromQueryFormat(form)).exemplar(exemplar)
    if legend:
        query = query.legend_format(legend)
    return query.instant() if instant else query.range()


def traceql(query: str, limit: int = 50) -> tempo.TempoQuery:
    """Return a search of Tempo with one row for each span."""
    newest = f"{query} with (most_recent=true)"  # else Tempo returns any
    search = tempo.TempoQuery().datasource(TEMPO).query_type("traceql").query(newest).limit(limit).ref_id("A")
    return search.filters([]).table_type(tempo_model.SearchTableType.SPANS)


def number(title: str, expr: str, *, unit: str = "short", red_above: float | None = None, what: str = "") -> Panel:
    """Return a panel with one number: red from the limit upwards, blue without a limit."""
    panel = stat.Panel().title(title).description(what).datasource(PROMETHEUS).unit(unit).height(4).span(3)
    panel = panel.with_target(promql(expr, instant=True)).no_value("0" if unit == "short" else "-")
    if red_above is None:
        steps = [model.Threshold(value=None, color="blue")]
    else:
        steps = [model.Threshold(value=None, color="green"), model.Threshold(value=red_above, color="red")]
    thresholds = dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)
    return panel.thresholds(thresholds).decimals(0 if unit == "short" else 1)


def lines(
    title: str,
    queries: Sequence[tuple[str, str]],
    *,
    unit: str = "short",
    what: str = "",
    bars: bool = False,
    exemplar: bool = False,
    width: int = 12,
) -> Panel:
    """Return a panel of values over time, by legend; as stacked bars for counts in each interval."""
    panel = timeseries.Panel().title(title).description(what).datasource(PROMETHEUS).unit(unit).height(8).span(width)
    for number_, (expr, legend) in enumerate(queries):
        panel = panel.with_target(promql(expr, legend, ref=chr(ord("A") + number_), exemplar=exemplar))
    panel = panel.min(0).show_points(common_model.VisibilityMode.AUTO)
    if bars:
        panel = panel.draw_style(common_model.GraphDrawStyle.BARS).fill_opacity(80).decimals(0)
        panel = panel.stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL))
        for result, colour in RESULT_COLOURS.items():
            fixed = {"mode": "fixed", "fixedColor": colour}
            panel = panel.override_by_name(result, [model.DynamicConfigValue(id_val="color", value=fixed)])
    return panel


def rows(
    title: str,
    columns: Sequence[tuple[str, str, str]],
    *,
    key: str = "cicd_pipeline_name",
    what: str = "",
    height: int = 8,
) -> Panel:
    """Return a table with one row for each value of a label.

    Args:
        title: Its title.
        columns: Heading, PromQL that keeps only the label, and unit of each column.
        key: The label.
        what: Its description.
        height: In grid rows.
    """
    panel = table.Panel().title(title).description(what).datasource(PROMETHEUS).height(height).span(24)
    names = {key: "Pipeline" if key == "cicd_pipeline_name" else key}
    for number_, (heading, expr, unit) in enumerate(columns):
        ref = chr(ord("A") + number_)
        panel = panel.with_target(promql(expr, ref=ref, instant=True, form="table"))
        field = f"Value #{ref}" if len(columns) > 1 else "Value"
        names[field] = heading
        panel = panel.override_by_name(heading, [model.DynamicConfigValue(id_val="unit", value=unit)])
    order = {name: number_ for number_, name in enumerate(names)}
    organize = {"excludeByName": {"Time": True}, "indexByName": order, "renameByName": names}
    panel = panel.with_transformation(model.DataTransformerConfig(id_val="merge", options={}))
    return panel.with_transformation(model.DataTransformerConfig(id_val="organize", options=organize))


def spans(title: str, query: str, *, what: str = "", height: int = 9, limit: int = 50) -> Panel:
    """Return a table of spans whose run ids and trace ids link to the dashboard of that job."""
    panel = table.Panel().title(title).description(what).datasource(TEMPO).height(height).span(24)
    panel = panel.with_target(traceql(query, limit))
    there = (
        "/d/tailspan-job?${__url_time_range}&${prometheus:queryparam}&${loki:queryparam}&${tempo:queryparam}"
        '&var-pipeline=${__data.fields["service.name"]:percentencode}'
        '&var-run_id=${__data.fields["cicd.pipeline.run.id"]:percentencode}'
        '&var-trace_id=${__data.fields["traceIdHidden"]:percentencode}'
    )
    link = {"title": "Open this job", "url": there}
    linked = [model.DynamicConfigValue(id_val="links", value=[link])]
    return panel.override_by_name("cicd.pipeline.run.id", linked)


def attempts(title: str, what: str) -> Panel:
    """Return a table of the attempts of a run's tasks, with a bar for each duration; a task's name shows its lines."""
    query = f'{{ {RUN} && span.cicd.pipeline.task.run.id =~ ".+" }} | select({TASK})'
    panel = table.Panel().title(title).description(what).datasource(TEMPO).height(9).span(24)
    panel = panel.with_target(traceql(query, 500))
    its_lines = (
        "/d/tailspan-job?${__url_time_range}&${prometheus:queryparam}&${loki:queryparam}&${tempo:queryparam}"
        "&var-pipeline=${pipeline:percentencode}&var-run_id=${run_id:percentencode}&var-trace_id=${trace_id:percentencode}"
        "&var-task=${__value.raw:percentencode}"
    )
    link = {"title": "Show the lines of this task", "url": its_lines}
    colours = {result: {"color": colour, "index": n} for n, (result, colour) in enumerate(RESULT_COLOURS.items())}
    values: dict[str, dict[str, object]] = {
        "cicd.pipeline.task.name": {"links": [link], "displayName": "Task"},
        "cicd.pipeline.task.run.result": {
            "displayName": "Result",
            "mappings": [{"type": "value", "options": colours}],
            "custom.cellOptions": {"type": "color-text"},
        },
        "tailspan.task.attempt": {"displayName": "Attempt", "custom.width": 90},
        "tailspan.task.queued_s": {"displayName": "Queued", "unit": "s"},
        "tailspan.task.id": {"displayName": "Task id"},
        "duration": {"custom.cellOptions": {"type": "gauge", "mode": "basic"}, "min": 0},
    }
    for field, properties in values.items():
        found = [model.DynamicConfigValue(id_val=key, value=value) for key, value in properties.items()]
        panel = panel.override_by_name(field, found)
    return panel


def outcome(title: str, field: str, *, unit: str = "string") -> Panel:
    """Return a panel with one attribute of the run span: it is there when the run has ended.

    Args:
        title: Its title.
        field: The column of the search result.
        unit: The unit of a number.
    """
    found = f'{{ {RUN} && kind = server && span.cicd.pipeline.result =~ ".+" }} | select({OUTCOME})'
    reduced = common.ReduceDataOptions().calcs(["lastNotNull"]).fields(f"/^{field.replace('.', chr(92) + '.')}$/")
    panel = stat.Panel().title(title).datasource(TEMPO).height(4).span(6).no_value("-").unit(unit)
    return panel.with_target(traceql(found, 1)).reduce_options(reduced).graph_mode(common_model.BigValueGraphMode.NONE)


def records(title: str, expr: str, *, what: str = "", height: int = 10, width: int = 24) -> Panel:
    """Return the newest log records, the newest first: of a long log, Loki returns only the end in this order."""
    query = loki.Dataquery().datasource(LOKI).expr(expr).ref_id("A").query_type("range").max_lines(1000)
    panel = logs.Panel().title(title).description(what).datasource(LOKI).height(height).span(width).with_target(query)
    panel = panel.show_time(True).wrap_log_message(True).enable_log_details(True)
    return panel.sort_order(common_model.LogsSortOrder.DESCENDING)


def new(uid: str, title: str, what: str, variables: Iterable[Builder[model.VariableModel]]) -> dashboard.Dashboard:
    """Return a dashboard without panels yet."""
    made = dashboard.Dashboard(title).uid(f"tailspan-{uid}").description(what).tags(["tailspan"]).editable()
    made = made.time("now-1h", "now").refresh("30s").tooltip(model.DashboardCursorSync.CROSSHAIR).timezone("browser")
    others = dashboard.DashboardLink("Tailspan").type(model.DashboardLinkType.DASHBOARDS).tags(["tailspan"])
    made = made.link(others.as_dropdown(True).keep_time(True))
    for variable in variables:
        made = made.with_variable(variable)
    return made


def source(kind: str) -> dashboard.DatasourceVariable:
    """Return the variable that chooses the data source of a kind."""
    return dashboard.DatasourceVariable(kind).label(kind.capitalize()).type(kind)


def choice(name: str, label: str, query: str, everything: str = ".+") -> dashboard.QueryVariable:
    """Return a variable with the values of a Prometheus label, all of them at first.

    Args:
        name: Its name.
        label: Its label.
        query: Finds the values.
        everything: The regular expression of all values.
    """
    variable = dashboard.QueryVariable(name).label(label).datasource(PROMETHEUS).query(query)
    variable = variable.refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(model.VariableSort.ALPHABETICAL_ASC)
    chosen = model.VariableOption(selected=True, text="All", value="$__all")
    return variable.multi(True).include_all(True).all_value(everything).current(chosen)


def text(name: str, label: str, default: str = "") -> dashboard.TextBoxVariable:
    """Return a variable to type into, or to be filled by a link."""
    option = model.VariableOption(selected=True, text=default, value=default)
    return dashboard.TextBoxVariable(name).label(label).default_value(default).current(option)


PIPELINES = choice("pipeline", "Pipeline", "label_values(cicd_pipeline_run_active, cicd_pipeline_name)")


# Without a name: the metric's name differs between explicit and native histograms. Lines of no task match, too.
_ITS_TASKS = '{__name__=~"tailspan_task_duration_seconds(_count)?", cicd_pipeline_name=`${pipeline:raw}`}'
TASKS = choice("task", "Task", f"label_values({_ITS_TASKS}, cicd_pipeline_task_name)", ".*")


def active(state: str, by: str = "") -> str:
    """Return PromQL for runs that are in a state now."""
    return (
        f'sum{f" by ({by}) " if by else ""}(cicd_pipeline_run_active{{{PIPELINE}, cicd_pipeline_run_state="{state}"}})'
    )


def by_pipeline(metric: str, join: str = "max") -> str:
    """Return PromQL for a gauge of pipelines."""
    return f"{join} by (cicd_pipeline_name) ({metric}{{{PIPELINE}}})"


def jobs() -> dashboard.Dashboard:
    """Return the dashboard of running jobs, ended jobs and anomalies."""
    what = "Running jobs, ended jobs and anomalies. A run id opens that job."
    board = new("jobs", "Tailspan: Jobs overview", what, [*map(source, ("prometheus", "loki", "tempo")), PIPELINES])
    alerts = 'ALERTS{alertstate="firing", alertname=~"Job.+|Agent.+|ServiceErrors"}'
    firing = rows(
        "Firing alerts", [("Alerts", f"count by (alertname, cicd_pipeline_name, instance) ({alerts})", "short")]
    )
    seen = (
        f'{{ resource.cicd.pipeline.name =~ {CHOSEN} && name = "submitted" }}'
        " | select(resource.service.name, resource.cicd.pipeline.run.id)"
    )
    runs = (
        f'{{ resource.cicd.pipeline.name =~ {CHOSEN} && kind = server && span.cicd.pipeline.result =~ ".+" }}'
        f" | select({SHOWN})"
    )
    return (
        board.with_panel(number("Running", active("executing")))
        .with_panel(number("Pending", active("pending")))
        .with_panel(number("Succeeded", ended_runs("$__range", matchers=SUCCEEDED), what="In the time range."))
        .with_panel(number("Failed", ended_runs("$__range", matchers=FAILED), red_above=1, what="In the time range."))
        .with_panel(number("Silent", f"sum(tailspan_job_silent{{{PIPELINE}}})", red_above=1))
        .with_panel(number("Slow", f"sum(tailspan_job_slow{{{PIPELINE}}})", red_above=1))
        .with_panel(number("Too fast", ended("tailspan_job_too_fast_total", "$__range"), red_above=1))
        .with_panel(number("Missing", f"sum(tailspan_pipeline_missing{{{PIPELINE}}})", red_above=1))
        .with_panel(
            lines(
                "Runs that ended",
                [(ended_runs("$__interval", "cicd_pipeline_result"), "{{cicd_pipeline_result}}")],
                bars=True,
            )
        )
        .with_panel(
            lines(
                "Runs that are active",
                [
                    (active("executing", "cicd_pipeline_name"), "{{cicd_pipeline_name}}"),
                    (active("pending", "cicd_pipeline_name"), "{{cicd_pipeline_name}} (pending)"),
                ],
            )
        )
        .with_panel(
            rows(
                "Running now",
                [
                    ("Running", active("executing", "cicd_pipeline_name") + " > 0", "short"),
                    ("Progress", by_pipeline("tailspan_job_progress_ratio", "min"), "percentunit"),
                    ("Time left", by_pipeline("tailspan_job_eta_seconds"), "s"),
                    ("Last line", by_pipeline("tailspan_job_last_line_age_seconds"), "s"),
                    ("Last heartbeat", by_pipeline("tailspan_job_heartbeat_age_seconds"), "s"),
                    ("So far", by_pipeline("tailspan_job_exec_time_seconds"), "s"),
                ],
            )
        )
        .with_panel(firing)
        .with_panel(spans("Ended runs", runs, what="The newest 50 of the time range."))
        .with_panel(spans("Jobs", seen, what="Running jobs included: each appears once, at its start."))
        .with_panel(records("Failures", f"{{service_name=~{CHOSEN}, {EVENTS}}} | exception_type != ``"))
    )


def job() -> dashboard.Dashboard:
    """Return the dashboard of one run."""
    variables = [
        *map(source, ("prometheus", "loki", "tempo")),
        text("pipeline", "Pipeline"),
        text("run_id", "Run id"),
        text("trace_id", "Trace id"),
        TASKS,
    ]
    what = (
        "One run: open it from Jobs overview, or type its name and id (tailspan jobs) and its trace id"
        " (tailspan status JOB)."
    )
    board = new("job", "Tailspan: One job", what, variables)
    its_trace = (
        tempo.TempoQuery().datasource(TEMPO).query_type("traceql").query("${trace_id:raw}").ref_id("A").filters([])
    )
    trace = dashboard.Panel().type("traces").title("Trace").datasource(TEMPO).with_target(its_trace).height(12).span(24)
    found = f"{{ {RUN} }} | select({SHOWN})"
    volume = f"sum by (detected_level) (count_over_time({TASK_LINES} [$__auto]))"
    levels = loki.Dataquery().datasource(LOKI).expr(volume).legend_format("{{detected_level}}").query_type("range")
    per_level = timeseries.Panel().title("Lines by level").datasource(LOKI).with_target(levels.ref_id("A"))
    per_level = per_level.draw_style(common_model.GraphDrawStyle.BARS).fill_opacity(80).height(8).span(12)
    per_level = per_level.stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL))
    return (
        board.with_panel(outcome("Result", "cicd.pipeline.result"))
        .with_panel(outcome("Duration", "duration", unit="ns"))
        .with_panel(outcome("Exit code", "process.exit.code"))
        .with_panel(outcome("Reason", "tailspan.exit.reason"))
        .with_panel(number("Progress", f"min(tailspan_job_progress_ratio{{{ONE_RUN}}})", unit="percentunit"))
        .with_panel(number("Time left", f"max(tailspan_job_eta_seconds{{{ONE_RUN}}})", unit="s"))
        .with_panel(number("Tasks done", f"sum(tailspan_job_tasks_finished{{{ONE_RUN}}})"))
        .with_panel(number("Tasks", f"sum(tailspan_job_tasks_total{{{ONE_RUN}}})"))
        .with_panel(number("Last line", f"max(tailspan_job_last_line_age_seconds{{{ONE_RUN}}})", unit="s"))
        .with_panel(number("So far", f"max(tailspan_job_exec_time_seconds{{{ONE_RUN}}})", unit="s"))
        .with_panel(number("Usually (p50)", f"max(tailspan_pipeline_duration_p50_seconds{{{ITS_PIPELINE}}})", unit="s"))
        .with_panel(
            number("Rarely over (p95)", f"max(tailspan_pipeline_duration_p95_seconds{{{ITS_PIPELINE}}})", unit="s")
        )
        .with_panel(
            lines(
                "Progress",
                [(f"min by (cicd_pipeline_name) (tailspan_job_progress_ratio{{{ONE_RUN}}})", "{{cicd_pipeline_name}}")],
                unit="percentunit",
                what="While it runs. Without agent.run_id_on_metrics, running jobs of one pipeline share these values.",
            )
        )
        .with_panel(per_level)
        .with_panel(spans("Its spans", found, height=7, what="Click the run id to fill in the trace id.", limit=20))
        .with_panel(trace)
        .with_panel(
            attempts(
                "Tasks",
                "Each attempt that has ended, the newest first; the trace above has them in their order of time."
                " Click a task to see only its lines.",
            )
        )
        .with_panel(records("Why it failed", f"{RUN_EVENTS} | exception_type != ``", height=8))
        .with_panel(records("Anomalies", f"{RUN_EVENTS} | tailspan_alert != ``", height=5, width=12))
        .with_panel(records("Delivery receipt", f'{RUN_LINES} | tailspan_lines_read != ""', height=5, width=12))
        .with_panel(records("Lines", TASK_LINES, height=20, what="Of all tasks, or of those that are chosen above."))
    )


def pipelines() -> dashboard.Dashboard:
    """Return the dashboard of many runs."""
    what = "Success, durations and errors of pipelines over many runs."
    board = new("pipelines", "Tailspan: Pipelines", what, [source("prometheus"), PIPELINES])
    per = "cicd_pipeline_name"
    successes = ended_runs("$__range", per, SUCCEEDED)
    all_runs = ended_runs("$__range", per)
    rate = f"({successes} or {all_runs} * 0) / ({all_runs} > 0)"
    last_success = f"min by ({per}) (tailspan_pipeline_last_end_age_seconds{{{SUCCEEDED}}})"
    quantile = " or ".join(f"histogram_quantile(0.95, {found}) >= 0" for found in durations("1h", per))
    red_to_green = dashboard.ThresholdsConfig().steps(
        [
            model.Threshold(value=None, color="red"),
            model.Threshold(value=0.9, color="orange"),
            model.Threshold(value=0.99, color="green"),
        ]
    )
    gauge = bargauge.Panel().title("Success rate").datasource(PROMETHEUS).unit("percentunit").min(0).max(1).height(8)
    gauge = gauge.span(12).with_target(promql(rate, "{{cicd_pipeline_name}}", instant=True))
    gauge = gauge.thresholds(red_to_green.mode(model.ThresholdsMode.ABSOLUTE)).decimals(1)
    gauge = gauge.orientation(common_model.VizOrientation.HORIZONTAL)
    cells = promql(" or ".join(durations("$__interval")), "{{le}}", form="heatmap", exemplar=True)
    heat = heatmap.Panel().title("Durations").datasource(PROMETHEUS).with_target(cells).height(9).span(24)
    heat = heat.description("Runs by how long they took; the dots link to their traces.").calculate(False)
    heat = heat.y_axis(heatmap.YAxisConfig().unit("s")).exemplars_color("rgba(255,0,255,0.7)")
    return (
        board.with_panel(gauge)
        .with_panel(
            lines(
                "Runs that ended",
                [(ended_runs("$__interval", "cicd_pipeline_result"), "{{cicd_pipeline_result}}")],
                bars=True,
            )
        )
        .with_panel(
            rows(
                "Pipelines",
                [
                    ("Runs", all_runs, "short"),
                    ("Success rate", rate, "percentunit"),
                    ("Usually (p50)", by_pipeline("tailspan_pipeline_duration_p50_seconds"), "s"),
                    ("Rarely over (p95)", by_pipeline("tailspan_pipeline_duration_p95_seconds"), "s"),
                    ("Since last start", by_pipeline("tailspan_pipeline_last_start_age_seconds", "min"), "s"),
                    ("Since last success", last_success, "s"),
                    ("Oldest pending", by_pipeline("tailspan_job_pending_age_seconds"), "s"),
                    ("Missing", by_pipeline("tailspan_pipeline_missing", "min"), "short"),
                ],
                what="Runs and success rate cover the time range; p50 and p95 cover the last successful runs.",
            )
        )
        .with_panel(heat)
        .with_panel(
            lines(
                "Usual durations",
                [
                    (by_pipeline("tailspan_pipeline_duration_p50_seconds"), "{{cicd_pipeline_name}} p50"),
                    (by_pipeline("tailspan_pipeline_duration_p95_seconds"), "{{cicd_pipeline_name}} p95"),
                ],
                unit="s",
            )
        )
        .with_panel(
            lines(
                "95th percentile of the last hour's runs",
                [(quantile, "{{cicd_pipeline_name}}")],
                unit="s",
                what="The dots are single runs and link to their traces.",
                exemplar=True,
            )
        )
        .with_panel(
            lines(
                "Errors by type",
                [
                    (
                        ended("cicd_pipeline_run_errors_total", "$__interval", f"{per}, error_type"),
                        "{{cicd_pipeline_name}}: {{error_type}}",
                    )
                ],
                bars=True,
                width=24,
            )
        )
    )


def agent() -> dashboard.Dashboard:
    """Return the dashboard of the agent's own health."""
    agents = choice("agent", "Agent", "label_values(tailspan_agent_uptime_seconds, instance)")
    board = new(
        "agent", "Tailspan: Agent health", "Delivery, errors and lag of the agents.", [source("prometheus"), agents]
    )

    def rate(metric: str, by: str) -> str:
        return f"sum by ({by}) (rate({metric}{{{AGENT}}}[$__rate_interval]))"

    def level(metric: str, by: str, join: str = "max") -> str:
        return f"{join} by ({by}) ({metric}{{{AGENT}}})"

    who = "tailspan_agent_id, host_name, tailspan_agent_version, instance"
    one = "{{instance}} {{service}}"
    return (
        board.with_panel(number("Agents", f"count(tailspan_agent_uptime_seconds{{{AGENT}}})"))
        .with_panel(number("Jobs followed", f"sum(tailspan_agent_jobs_followed{{{AGENT}}})"))
        .with_panel(number("In flight", f"sum(tailspan_agent_records_in_flight{{{AGENT}}})"))
        .with_panel(
            number(
                "Signals not accepted", f"count(tailspan_agent_endpoint_up{{{AGENT}}} == 0) or vector(0)", red_above=1
            )
        )
        .with_panel(number("Rejected", f"sum(tailspan_agent_records_rejected_total{{{AGENT}}})", red_above=1))
        .with_panel(number("Gaps", f"sum(tailspan_agent_gaps_total{{{AGENT}}})", red_above=1))
        .with_panel(number("Late lines", f"sum(tailspan_agent_lines_late_total{{{AGENT}}})"))
        .with_panel(number("Secrets masked", f"sum(tailspan_agent_redactions_total{{{AGENT}}})"))
        .with_panel(
            lines(
                "Records",
                [
                    (rate("tailspan_agent_records_read_total", "service"), "{{service}} read"),
                    (rate("tailspan_agent_records_acked_total", "service"), "{{service}} acked"),
                ],
                unit="cps",
            )
        )
        .with_panel(
            lines(
                "Records that were not delivered",
                [
                    (
                        rate("tailspan_agent_records_rejected_total", "service, reason"),
                        "{{service}} rejected: {{reason}}",
                    ),
                    (
                        rate("tailspan_agent_records_dropped_total", "service, reason"),
                        "{{service}} dropped: {{reason}}",
                    ),
                ],
                unit="cps",
                what="Rejected: by the endpoint, kept in the dead letter. Dropped: left out by min_severity.",
            )
        )
        .with_panel(lines("Lag", [(level("tailspan_agent_lag_seconds", "instance, service"), one)], unit="s"))
        .with_panel(lines("In flight", [(level("tailspan_agent_records_in_flight", "instance, service", "sum"), one)]))
        .with_panel(
            lines(
                "Endpoint",
                [(level("tailspan_agent_endpoint_up", "instance, signal", "min"), "{{instance}} {{signal}}")],
            )
        )
        .with_panel(
            lines(
                "Exports that failed",
                [(rate("tailspan_agent_export_errors_total", "signal, error_type"), "{{signal}}: {{error_type}}")],
                unit="cps",
            )
        )
        .with_panel(
            lines(
                "Requests to services", [(rate("tailspan_agent_polls_total", "service"), "{{service}}")], unit="reqps"
            )
        )
        .with_panel(
            lines(
                "Requests to services that failed",
                [(rate("tailspan_agent_poll_errors_total", "service, error_type"), "{{service}}: {{error_type}}")],
                unit="reqps",
            )
        )
        .with_panel(
            lines(
                "Checkpoint age",
                [(level("tailspan_agent_checkpoint_age_seconds", "instance"), "{{instance}}")],
                unit="s",
            )
        )
        .with_panel(lines("Jobs followed", [(level("tailspan_agent_jobs_followed", "instance, service", "sum"), one)]))
        .with_panel(
            lines(
                "Fleet: shards by agent",
                [(level("tailspan_fleet_shards", "instance", "sum"), "{{instance}}")],
                what=f"{OF_A_FLEET} All agents together have 256 shards; each has a fair share, plus or minus one.",
            )
        )
        .with_panel(
            lines(
                "Fleet: shards taken over",
                [
                    (
                        f"sum by (instance) (increase(tailspan_fleet_takeovers_total{{{AGENT}}}[$__rate_interval]))",
                        "{{instance}}",
                    )
                ],
                bars=True,
                what=f"{OF_A_FLEET} By the agent that took them from one that did not renew its leases.",
            )
        )
        .with_panel(
            lines(
                "Fleet: age of the leases",
                [(level("tailspan_fleet_lease_age_seconds", "instance"), "{{instance}}")],
                unit="s",
                what=f"{OF_A_FLEET} Usually below a third of fleet.lease; an agent stops reading at four fifths.",
            )
        )
        .with_panel(
            lines(
                "Fleet: duration of hand-overs",
                [(level("tailspan_fleet_handover_duration_seconds", "instance"), "{{instance}}")],
                unit="s",
                what=f"{OF_A_FLEET} The last one of each agent: the endpoint must have accepted what was sent.",
            )
        )
        .with_panel(rows("Agents", [("Uptime", level("tailspan_agent_uptime_seconds", who), "s")], key="host_name"))
    )


DASHBOARDS = {"jobs": jobs, "job": job, "pipelines": pipelines, "agent": agent}


def as_json(name: str) -> str:
    """Return one dashboard as the text of its file."""
    board = DASHBOARDS[name]().build()
    for number_, panel in enumerate(board.panels or [], start=1):
        panel.id_val = number_
    return json.dumps(board, cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in DASHBOARDS:
        (Path(__file__).parent / "dashboards" / f"{name}.json").write_text(as_json(name), encoding="utf-8")
