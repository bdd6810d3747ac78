{{- define "tailspan.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- printf "%s-agent" .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-tailspan-agent" .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{/* What selects the pods; it never changes. */}}
{{- define "tailspan.selector" -}}
app.kubernetes.io/name: tailspan-agent
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tailspan.labels" -}}
{{ include "tailspan.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "tailspan.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "tailspan.serviceAccount" -}}
{{ .Values.serviceAccount.existingName | default (include "tailspan.fullname" .) }}
{{- end }}

{{- define "tailspan.tokens" -}}
{{ .Values.tokens.existingSecret | default (printf "%s-tokens" (include "tailspan.fullname" .)) }}
{{- end }}

{{/* "cluster" or "namespace": where the rights of the agent count. */}}
{{- define "tailspan.roleScope" -}}
{{ ternary "namespace" "cluster" (ne .Values.kubernetesJobs.namespace "") }}
{{- end }}

{{/* Helm reads each number of a file as a float; write 2000000 as that and not as 2e+06. Changes its argument. */}}
{{- define "tailspan.wholeNumbers" -}}
{{- $map := . -}}
{{- range $key, $value := $map -}}
{{- if kindIs "map" $value -}}
{{- include "tailspan.wholeNumbers" $value -}}
{{- else if kindIs "slice" $value -}}
{{- range $value }}{{ if kindIs "map" . }}{{ include "tailspan.wholeNumbers" . }}{{ end }}{{ end -}}
{{- else if kindIs "float64" $value -}}
{{- if eq (floor $value) $value }}{{ $_ := set $map $key (int64 $value) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* config with what the chart knows. Keys of the user win, except those that must fit the pod. */}}
{{- define "tailspan.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- if .Values.kubernetesJobs.enabled -}}
{{- $service := dict "all_namespaces" true -}}
{{- with .Values.kubernetesJobs.namespace }}{{ $service = dict "namespace" . }}{{ end -}}
{{- with .Values.kubernetesJobs.cluster }}{{ $_ := set $service "cluster" . }}{{ end -}}
{{- $watch := list (dict "service" "kubernetes" "discover" true) -}}
{{- $config = merge $config (dict "services" (dict "kubernetes" $service) "agent" (dict "watch" $watch)) -}}
{{- if .Values.kubernetesJobs.allowCancel }}{{ $config = merge $config (dict "agent" (dict "allow_cancel" true)) }}{{ end -}}
{{- end -}}
{{- $config = mergeOverwrite $config (dict "agent" (dict "listen" "0.0.0.0:8797" "token_file" "/run/secrets/tailspan/page")) -}}
{{- include "tailspan.wholeNumbers" $config -}}
{{- toToml $config -}}
{{- end }}

{{- define "tailspan.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
