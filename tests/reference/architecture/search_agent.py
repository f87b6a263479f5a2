from agentweave_bus import SecureAgent, capability
from agentweave_bus.types import TaskResult

class SearchAgent(SecureAgent):
    """Searches data stores for information."""

    @capability("search")
    async def search(self, query: str, filters: dict = None) -> TaskResult:
        results = await self._database.search(query, filters)
        return TaskResult(
            status="completed",
            artifacts=[{"type": "results", "data": results}]
        )
