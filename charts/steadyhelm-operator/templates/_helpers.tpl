{{/* What all names begin with: the release, and the chart's name where the release does not say it. */}}
{{- define "operator.name" -}}
{{ ternary .Release.Name (printf "%s-operator" .Release.Name | trunc 63) (contains "operator" .Release.Name) }}
{{- end }}

{{/* Labels by which the pod is selected. */}}
{{- define "operator.selector" -}}
app.kubernetes.io/name: steadyhelm-operator
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: operator
{{- end }}

{{/* Labels of every object of the chart. */}}
{{- define "operator.labels" -}}
{{ include "operator.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: steadyhelm
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Reference of the image. */}}
{{- define "operator.image" -}}
{{- $image := .Values.image }}
{{- if regexMatch "[:@]" (base $image.name) -}}
{{ $image.name }}
{{- else -}}
{{- with $image.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ $image.name }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{/* What the operator may do where TrainingRuns are. */}}
{{- define "operator.rules" -}}
- apiGroups: [steadyhelm.dev]
  resources: [trainingruns]
  verbs: [get, list, watch, patch]
- apiGroups: [steadyhelm.dev]
  resources: [trainingruns/status]
  verbs: [patch]
# For the owner reference of a RayCluster, where the API server asks for it.
- apiGroups: [steadyhelm.dev]
  resources: [trainingruns/finalizers]
  verbs: [update]
- apiGroups: [ray.io]
  resources: [rayclusters]
  verbs: [get, list, watch, create, patch, delete]
# To say why pods do not run.
- apiGroups: [""]
  resources: [pods]
  verbs: [list]
# The Ray API's token, by name.
- apiGroups: [""]
  resources: [secrets]
  verbs: [get]
  {{- with .Values.rbac.tokenSecrets }}
  resourceNames: {{- toYaml . | nindent 4 }}
  {{- end }}
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end }}
