"""The "Component Interactions" of the architecture page, each made a function of what it takes as given."""

import ssl

from agentweave_bus.exceptions import AuthorizationError


async def identity_and_transport(identity_provider):
    # Identity provides the SVID
    svid = await identity_provider.get_svid()

    # Transport uses it to create SSL context
    ssl_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ssl_context.load_cert_chain(
        certfile=svid.cert_chain_path,
        keyfile=svid.private_key_path
    )
    return ssl_context


async def identity_and_authorization(identity_provider, authz):
    # Identity provides SPIFFE ID
    my_spiffe_id = identity_provider.get_spiffe_id()

    # Authorization uses it in policy evaluation
    decision = await authz.check_outbound(
        caller_id=my_spiffe_id,  # From identity
        callee_id="spiffe://company.com/agent/target",
        action="search"
    )
    return decision


async def authorization_and_communication(task, peer_spiffe_id, authz, route_to_capability):
    # Authorization checks before routing
    decision = await authz.check_inbound(
        caller_id=peer_spiffe_id,
        action=task.type,
        context={"task_id": task.id}
    )

    if not decision.allowed:
        raise AuthorizationError(decision.reason)

    # Only then route to handler
    result = await route_to_capability(task)
    return result
