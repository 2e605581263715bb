"""Entry of the `finery` command: puts the groups of commands together."""

from __future__ import annotations

import typer

from finery_cli.commands import artifacts, chat, convert, deployments, estimate, files, jobs, models, system


def build_app() -> typer.Typer:
    """The whole command."""
    app = typer.Typer(
        name="finery",
        help="Fine-tune open-weight models on your own machines and serve the result.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    system.register(app)
    app.add_typer(files.app, name="files")
    app.add_typer(jobs.app, name="jobs")
    app.add_typer(models.app, name="models")
    app.add_typer(artifacts.app, name="artifacts")
    app.add_typer(deployments.app, name="deployments")
    deployments.register(app)
    estimate.register(app)
    convert.register(app)
    chat.register(app)
    return app


def main() -> None:
    """Runs the command line."""
    build_app()()


if __name__ == "__main__":
    main()
