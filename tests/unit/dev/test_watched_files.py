"""Which files an agent is made of, and whom a change concerns, without importing anything."""

from __future__ import annotations

import shutil
from contextlib import aclosing
from pathlib import Path

import anyio
import pytest

from agentweave_bus.config import StackConfig
from agentweave_bus.dev.concerned import WatchedStack
from agentweave_bus.dev.source_files import SourceFiles
from agentweave_bus.dev.watching import changes
from agentweave_bus.embedded.assembly import plan_agents
from agentweave_bus.exceptions import ConfigurationError

RAISES = "raise RuntimeError('nothing is imported to find this out')\n"


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(RAISES + text)


def stack(folder: Path, classes: dict[str, str], **more: str) -> WatchedStack:
    entries = []
    for name, path in classes.items():
        file = folder / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"agent: {{name: {file.stem}, trust_domain: a.io, class: '{path}'}}\n")
        entries.append({"config": file})
    config = StackConfig.model_validate({"trust_domain": "a.io", "agents": entries, **more})
    return WatchedStack(config, plan_agents(config), folder / "agentweave.yaml")


def test_files_are_found_through_all_forms_of_import(tmp_path: Path) -> None:
    write(
        tmp_path,
        shop__init="",
        shop__order="import json, pydantic\nfrom . import goods\nfrom .deep.prices import price\nimport plain",
        shop__goods="def late():\n    from shop.deep import rates",
        shop__deep__prices="",
        shop__deep__rates="",
        shop__unused="",
        plain="",
    )
    (tmp_path / "shop" / "init.py").rename(tmp_path / "shop" / "__init__.py")
    found = SourceFiles().of("shop.order", tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in found.values()} == {
        "shop/__init__.py",
        "shop/order.py",
        "shop/goods.py",
        "shop/deep/prices.py",
        "shop/deep/rates.py",
        "plain.py",
    }


def test_a_file_that_can_not_be_parsed_counts_with_what_it_imported(tmp_path: Path) -> None:
    write(tmp_path, order="import goods", goods="")
    sources = SourceFiles()
    before = sources.of("order", tmp_path)
    (tmp_path / "order.py").write_text("import goods\ndef (")
    assert sources.of("order", tmp_path) == before
    assert len(before) == 2


def test_whom_a_change_concerns(tmp_path: Path) -> None:
    write(tmp_path, order="import shared", stock="import shared", mail="", shared="", test_order="")
    watched = stack(
        tmp_path,
        {"order": "order:A", "stock": "stock:A", "mail": "mail:A"},
        grants=str(tmp_path / "grants.yaml"),
    )

    def concerned(name: str) -> list[str]:
        return watched.concerned({tmp_path / name})

    assert concerned("order.py") == ["order"]
    assert concerned("shared.py") == ["order", "stock"]
    assert concerned("mail.yaml") == ["mail"]
    assert concerned("prices.json") == ["order", "stock", "mail"]  # data beside the code of all
    for followed_by_itself_or_nobody in ("grants.yaml", "agentweave.yaml", "test_order.py"):
        assert concerned(followed_by_itself_or_nobody) == []
    assert watched.sharing("stock") == ["order", "stock"]
    assert watched.sharing("mail") == ["mail"]


def test_a_file_that_was_missing_concerns_who_imports_it(tmp_path: Path) -> None:
    write(tmp_path, order="import goods")
    watched = stack(tmp_path, {"order": "order:A"})
    write(tmp_path, goods="")
    assert watched.concerned({tmp_path / "goods.py"}) == ["order"]


def test_two_modules_of_one_name_are_refused_in_one_process(tmp_path: Path) -> None:
    write(tmp_path, one__agent="", two__agent="")
    stack(tmp_path, {"one/a": "agent:A"}).check_one_process()
    with pytest.raises(ConfigurationError, match=r"The module agent is .*one/agent\.py for one agent"):
        stack(tmp_path, {"one/a": "agent:A", "two/b": "agent:A"}).check_one_process()


@pytest.mark.anyio
async def test_the_files_of_a_folder_that_comes_back_have_changed(tmp_path: Path) -> None:
    """As where another branch, which has no such folder, is looked at for a while."""
    shop = tmp_path / "shop"
    file = shop / "order.py"
    shop.mkdir()
    file.write_text("one")
    with anyio.fail_after(30):
        async with aclosing(changes(lambda: [shop])) as all_changes, anyio.create_task_group() as group:

            async def away() -> None:
                await anyio.sleep(0.5)
                shutil.rmtree(shop)

            async def back() -> None:
                await anyio.sleep(1.5)  # it is looked every second
                shop.mkdir()
                file.write_text("one")

            group.start_soon(away)
            assert await anext(all_changes) == {file}
            group.start_soon(back)
            assert await anext(all_changes) == {file}
