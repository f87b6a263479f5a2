agentweave call \
--target spiffe://agentweave.io/agent/gateway \
--capability route \
--data '{
"service": "order",
"action": "create_order",
"payload": {
"user_id": "<user-id-from-above>",
"items": [
{"sku": "WIDGET-001", "quantity": 2, "price": "19.99"}
],
"payment_method": "credit_card"
}
}'
