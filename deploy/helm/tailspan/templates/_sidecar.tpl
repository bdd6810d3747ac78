{{/*
The agent as a native sidecar, an entry of a pod's initContainers. The pod needs a volume `tailspan`, the same user for all
containers, and terminationGracePeriodSeconds of 105: preStop's minute, and agent.drain_timeout.

Call it with a dict: "image", "endpoint" of OTLP.
*/}}
{{- define "tailspan.sidecar" -}}
- name: tailspan-agent
  image: {{ .image }}
  restartPolicy: Always
  args: [agent, run]
  env:
    - name: TAILSPAN_OTLP__ENDPOINT
      value: {{ .endpoint | quote }}
  lifecycle:
    preStop:
      exec:
        command:
          - sh
          - -c
          - tailspan jobs --all --quiet | timeout 60 xargs -r -n 1 tailspan wait --delivered
  resources:
    requests:
      cpu: 20m
      memory: 96Mi
    limits:
      memory: 256Mi
  securityContext:
    {{- include "tailspan.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - name: tailspan
      mountPath: /var/lib/tailspan
{{- end }}
