"""The end of the test run (conftest imports the hook): CPU seconds that tests/test_notebooks.py recorded."""


def pytest_terminal_summary(terminalreporter):
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    recorded = [dict(report.user_properties) for report in reports if report.when == "call"]
    rows = sorted((*row["notebook"].split("/")[::-1], row["cpu_seconds"]) for row in recorded if "cpu_seconds" in row)
    if rows:
        terminalreporter.section("CPU seconds of the chapters")
        terminalreporter.line("chapter                                  edition      CPU seconds")
        for chapter, edition, seconds in rows:
            terminalreporter.line(f"{chapter:40s} {edition:10s} {seconds:13.1f}")
        terminalreporter.line(f"{'together':51s} {sum(row[2] for row in rows):13.1f}")
