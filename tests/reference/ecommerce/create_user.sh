agentweave call \
--target spiffe://agentweave.io/agent/gateway \
--capability route \
--data '{
"service": "user",
"action": "create_user",
"payload": {
"email": "user@example.com",
"name": "John Doe",
"tier": "premium"
}
}'
